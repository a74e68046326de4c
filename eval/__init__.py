"""How good and how fast accelerated pictures are: rewards, fidelity, cost and statistics."""
