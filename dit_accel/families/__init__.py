"""What is known of every transformer family, and the token-wise blocks of those at module scope."""
