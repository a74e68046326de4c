"""Attention received and the entropy of attention to the text per token, in memory that grows with the tokens alone."""

from collections.abc import Iterator

import torch

from dit_accel.chunks import at_once

CHUNK = 64  # queries whose attention rows exist at the same time on a CPU
QUERIES = 256  # at least so many queries are asked; every one of them where a sequence has fewer than twice as many


def query_stride(tokens: int, share: float) -> int:
    """Every how many-th token is asked as a query, for a share of the tokens but at least `QUERIES` of them."""
    return max(1, min(round(1 / share), tokens // QUERIES))


def sample(tokens: int, stride: int, device: torch.device) -> torch.Tensor:
    """Places [ceil(tokens / stride)] of the tokens that are asked, one among every `stride`.

    Its place among them moves by the golden ratio: a fixed one would always fall on the same columns of the picture.
    """
    number = torch.arange(-(-tokens // stride), device=device)
    return (number * stride + number * 40503 % 65536 * stride // 65536).clamp(max=tokens - 1)


def norms(heads: torch.Tensor) -> torch.Tensor:
    """L2 norms of keys or values [B, N, H, D], mean over heads, [B, N] in float32."""
    lengths: torch.Tensor = torch.linalg.vector_norm(heads, dim=-1, dtype=torch.float32)
    return lengths.mean(dim=-1)


def attention_from_a_sample(query: torch.Tensor, key: torch.Tensor, share: float) -> torch.Tensor:
    """`attention_received` from a share of the queries [B, N, H, D]."""
    return attention_received(query[:, sample(query.shape[1], query_stride(query.shape[1], share), query.device)], key)


def attention_received(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Column means of softmax(Q K^T / sqrt(D)) over queries and heads, without the map, of which rows exist in the type of Q and K.

    Args:
        query: [B, M, H, D], all queries or a sample of them.
        key: [B, N, H, D], or with one head for several of the queries'.

    Returns:
        [B, N] in float32; a row sums to 1.
    """
    received = torch.zeros(key.shape[:2], device=key.device)
    for rows in _rows_of_the_map(query, key, None):
        received = received + rows.sum(dim=(1, 2), dtype=torch.float32)
    return received / (query.shape[1] * query.shape[2])


def attention_entropy(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, halves: bool) -> torch.Tensor:
    """ToCa's score of attention to the text: 1 - sum c log(c + 1e-7), with c a row of the map averaged over heads.

    Args:
        query: [B, N, H, D]; key: [B, T, H, D].
        mask: None or [B, 1 or H, 1, T], added to the scores of all queries.
        halves: whether the batch has both halves of guidance, whose maps are then averaged too.

    Returns:
        [B, N] in float32.
    """
    found = []
    for rows in _rows_of_the_map(query, key, mask):
        seen = rows.mean(dim=1, dtype=torch.float32)  # [B, n, T]
        if halves:
            seen = seen.unflatten(0, (2, -1)).mean(dim=0).repeat(2, 1, 1)
        found.append(1 - (seen * (seen + 1e-7).log()).sum(dim=-1))
    return torch.cat(found, dim=1)


def _rows_of_the_map(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """[B, H, n, N] each, as many queries as may exist at once."""
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2) if query.shape[2] > key.shape[2] else key
    query, key = query.transpose(1, 2) * query.shape[-1] ** -0.5, key.permute(0, 2, 3, 1)  # [B, H, M, D], [B, H, D, N]
    for part in query.split(at_once(CHUNK, query.device), dim=2):
        scores = part @ key
        yield (scores if mask is None else scores + mask).softmax(dim=-1)
