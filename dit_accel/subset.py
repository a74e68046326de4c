"""Does a block treat every token by itself once its mixers are set aside? Checked before tokens are selected."""

import contextlib
import inspect
from typing import Any

import torch
from diffusers.hooks import ModelHook

from dit_accel import hook
from dit_accel.families.rows import Family
from dit_accel.packed import HOOK, blocks_of, parts
from dit_accel.steps import Block

TOKENS, TEXT, STRIDE = 15, 4, 5


class _Through(ModelHook):  # type: ignore[misc]
    """A mixer that hands on its tokens, and its text where that is a stream of its own."""

    def __init__(self, text: str | None) -> None:
        super().__init__()
        self.text = text

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        tokens, text = args[0] if args else kwargs["hidden_states"], kwargs.get(self.text or "")
        return tokens if text is None else (tokens, text)


@torch.no_grad()
def subset_check(transformer: Any, family: Family) -> None:
    """Run a block of every stack on random tokens and on a fifth of them; TypeError with the name of what gives other rows."""
    checked: set[str] = set()
    for site, block in blocks_of(transformer, family):
        if site.stack.blocks not in checked:
            checked.add(site.stack.blocks)
            with contextlib.ExitStack() as undo:
                _check(site, block, transformer.dtype, undo)


def _check(site: Block, block: Any, dtype: torch.dtype, undo: contextlib.ExitStack) -> None:
    mixers, prefix, given = parts(block, site.stack.mixers), f"{site.stack.blocks}.0", _example(site, block, dtype)
    for _, mixer in mixers:
        undo.callback(hook.unregister, mixer, HOOK)
        hook.register(mixer, _Through(site.stack.text), HOOK)
    known = {id(part) for _, mixer in mixers for part in mixer.modules()}
    tokens = given[site.stack.tokens]
    rows = torch.arange(0, TOKENS, STRIDE, device=tokens.device)
    trace: list[tuple[str, Any]] = []
    for path, module in block.named_modules():
        if id(module) in known:
            continue
        name = f"{prefix}.{path}".rstrip(".") + f" ({type(module).__name__})"
        if any(size != 1 for size in getattr(module, "kernel_size", ())):
            raise TypeError(_refusal(name))
        handle = module.register_forward_hook(lambda module, args, output, name=name: trace.append((name, output)))
        undo.callback(handle.remove)
    try:
        block(**given)
        whole, trace = trace, []
        block(**{**given, site.stack.tokens: tokens[:, rows]})
    except Exception as error:
        raise TypeError(_refusal(f"{prefix} ({type(block).__name__})") + f" It failed on some of its tokens: {error}") from error
    words = torch.arange(TEXT, device=tokens.device)
    joint = torch.cat([rows, words + TOKENS] if site.stack.text_last else [words, rows + TEXT])
    for (name, expected), (_, found) in zip(whole, trace, strict=True):
        for a, b in zip(*(value if isinstance(value, tuple) else (value,) for value in (expected, found)), strict=True):
            chosen = {TOKENS: rows, TOKENS + TEXT: joint}.get(a.shape[1]) if isinstance(a, torch.Tensor) and a.ndim > 2 else None
            if chosen is not None:
                a = a[:, chosen].float()
                close = max(1e-5, 4 * torch.finfo(b.dtype).eps) * float(a.abs().max())
                if a.shape != b.shape or float((a - b.float()).abs().max()) > close:
                    raise TypeError(_refusal(name))


def _refusal(name: str) -> str:
    return (
        f"{name} mixes tokens, so it cannot compute some of them alone: leave compute_ratio at 0, which forecasts the whole output."
    )


def _example(site: Block, block: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Small random arguments of a block, in its own widths, type and device; None for what only mixers look at."""
    stack = site.stack
    hooks = [getattr(module, "_hf_hook", None) for module in block.modules()]  # of offloading
    devices = [device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None]
    device = devices[0] if devices else next(block.parameters()).device
    generator = torch.Generator().manual_seed(0)
    linear = next(part for part in parts(block, stack.mixers)[0][1].modules() if hasattr(part, "in_features"))
    width = int(linear.in_features)

    def random(*shape: int | str) -> torch.Tensor:
        if not shape:
            return torch.zeros(1, dtype=torch.long, device=device)
        sizes = [block.get_submodule(s).in_features if isinstance(s, str) else -s * width if s < 0 else s for s in shape]
        return torch.randn(1, *sizes, generator=generator).to(device, dtype)

    parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
    given: dict[str, Any] = {p.name: None for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    given |= {name: random(*shape) for name, shape in stack.example.items()}
    given[stack.tokens] = random(TOKENS, -1)
    if stack.text is not None:
        given[stack.text] = random(TEXT, -1)
    return given
