"""The command `dit-accel ui`: a page on which a picture is made faster and compared with the uncached one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from dit_accel.pipelines import options
from dit_accel.pipelines.terminal import err, plain_errors, quiet, usage

EXAMPLES = ("red apple, 3d style", "tiger face, flat style", "cactus, cartoon style")
LEAST, MOST = 1.5, 6.0  # speeds on the slider; up to the fastest recipe where there is one
COLORS = {"full": "#2563eb", "conditional": "#93c5fd", "tokens": "#93c5fd", "none": "#e5e7eb"}
WORDS = {
    "full": "computed",
    "conditional": "computed without the unconditional branch",
    "tokens": "some tokens computed",
    "none": "forecast",
}
STYLE = """
.dit-steps { display: flex; height: 26px; border-radius: 4px; overflow: hidden }
.dit-steps > span { border-right: 1px solid white }
.dit-legend { display: flex; gap: 16px; margin: 6px 0 0; font-size: 0.85em }
.dit-legend i { display: inline-block; width: 10px; height: 10px; margin-right: 5px }
"""


def ui(
    pipeline: Annotated[
        list[str] | None, typer.Argument(help="Names of `dit-accel pipelines`, hub ids, or folders; by default the embedded ones.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 serves the page to your whole network.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="By default the first free one from 7860 on.")] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    offload: options.Offload = "none",
    debug: options.Debug = False,
) -> None:
    """Open a page to try speeds: a prompt, a slider, and the faster picture over the uncached one.

    [bold]Examples[/]

      dit-accel ui

      dit-accel ui flux-dev --offload model --port 8000
    """
    with plain_errors(debug, "ui"):
        import gradio  # noqa: F401  before anything is loaded

        from dit_accel.pipelines.catalog import CATALOG
        from dit_accel.pipelines.loading import understand

        quiet()
        with usage(options.SETTINGS):
            understand(dtype, device, offload)
        log = err()
        names = pipeline or [entry.name for entry in CATALOG.values() if entry.embedded]
        studio = Studio(names, (dtype, device, offload))
        with usage():
            studio.pipe(names[0])  # an error shows here, and the first picture comes sooner
        page, look = build(studio)
        page.queue()
        _, address, _ = page.launch(
            **look, server_name=host, server_port=port, share=False, quiet=True, inbrowser=browser, prevent_thread_lock=True
        )
        log.print(f"{address} shows the page. Ctrl-C ends it.", soft_wrap=True, highlight=False)
        page.block_thread()


class Studio:
    """Pipelines by name, loaded when they are first asked for; and the uncached pictures made last."""

    def __init__(self, names: Sequence[str], machine: tuple[str, str, str]) -> None:
        self.names, self.machine = list(names), machine
        self.pipes: dict[str, Any] = {}
        self.uncached: dict[Any, Any] = {}
        self.busy = threading.Lock()  # a transformer serves one call at a time

    def pipe(self, name: str) -> Any:
        if name not in self.pipes:
            from dit_accel.pipelines.loading import load

            self.pipes[name] = load(name, *self.machine)
        return self.pipes[name]

    def fastest(self, name: str) -> float:
        """The highest speed-up that can be asked for."""
        import dit_accel

        return max([one.speedup for one in dit_accel.recipes(self.pipe(name))] or [MOST])

    def make(self, name: str, prompt: str, speedup: float, seed: int, progress: Any) -> tuple[Any, Any, str, Any]:
        """The uncached picture, the faster one, a line about how the latter was chosen, and a report of what it computed."""
        import dit_accel
        from dit_accel.pipelines.generation import denoise, recipe_of, settings_for, switched, warm_up

        with self.busy:
            pipe = self.pipe(name)
            settings = settings_for(pipe, name, seed=int(seed))
            said, configs = recipe_of(pipe, min(float(speedup), self.fastest(name)), None, settings.steps)
            key, batch, done = (name, prompt, settings), [(prompt, settings.seed)], 0

            def on_step() -> None:
                nonlocal done
                done += 1
                progress((done, settings.steps), desc="Denoising", unit="steps")

            if key not in self.uncached:
                warm_up(pipe, [prompt], configs, settings)
                with switched(pipe, None):
                    self.uncached = {key: denoise(pipe, batch, settings, on_step, applied=False)[0]}
            done = 0
            with switched(pipe, configs):
                faster = denoise(pipe, batch, settings, on_step, applied=False)[0]
                report = dit_accel.report(pipe)
            return self.uncached[key], faster, said, report


def build(studio: Studio) -> tuple[Any, dict[str, Any]]:
    """The page, and how it looks; nothing on it is loaded from elsewhere."""
    import gradio as gr

    from dit_accel.pipelines.pictures import psnr, psnr_text
    from dit_accel.pipelines.prompts import unknown_words

    first, shown = studio.names[0], gr.Progress()

    def make(name: str, prompt: str, speedup: float, seed: float, progress: Any = shown) -> Any:
        if not (prompt := (prompt or "").strip()):
            raise gr.Error("Write what to draw.")
        if words := unknown_words(studio.pipe(name), prompt):
            gr.Warning(f"{name} does not know {', '.join(words)}.")
        try:
            full, faster, said, report = studio.make(name, prompt, speedup, int(seed or 0), progress)
        except ValueError as error:
            raise gr.Error(str(error)) from error
        gain, likeness = full.denoising_seconds / faster.denoising_seconds, psnr(full.image, faster.image)
        facts = (
            f"**{gain:.2f}x as fast**: {faster.denoising_seconds:.2f} s of denoising instead of {full.denoising_seconds:.2f} s. "
            f"Likeness to the uncached picture: PSNR {psnr_text(likeness)}. {said}"
        )
        return (full.image, faster.image), facts, steps_drawn(report)

    def other(name: str, speedup: float) -> Any:
        most = studio.fastest(name)
        return gr.Slider(maximum=most, value=min(speedup, most))

    with gr.Blocks(title="dit-accel", analytics_enabled=False) as page:
        gr.Markdown("# dit-accel\nThe same picture, sooner. Drag the line: uncached on the left, faster on the right.")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                prompt = gr.Textbox(EXAMPLES[0], label="Prompt", elem_id="prompt")
                name = gr.Dropdown(studio.names, value=first, label="Pipeline", elem_id="pipeline", visible=len(studio.names) > 1)
                speed = gr.Slider(LEAST, studio.fastest(first), 3, step=0.5, label="Times as fast, at least", elem_id="speed")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
                button = gr.Button("Make both", variant="primary", elem_id="make")
                gr.Examples([[example] for example in EXAMPLES], [prompt])
            with gr.Column(scale=3, min_width=420):
                both = gr.ImageSlider(
                    label="Uncached | faster", type="pil", format="png", max_height=480, interactive=False, elem_id="both"
                )
                facts, steps = gr.Markdown(elem_id="facts"), gr.HTML(elem_id="steps")
        name.change(other, [name, speed], speed)
        gr.on([button.click, prompt.submit, speed.release], make, [name, prompt, speed, seed], [both, facts, steps])
    fonts = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return page, dict(theme=gr.themes.Default(**fonts), css=STYLE, footer_links=[])


def steps_drawn(report: Any) -> str:
    """A bar of the run's steps, colored by what was computed of each, with a legend."""
    kinds: dict[int, str] = {}
    for call in report.calls:
        kind = "tokens" if call.tokens_computed else "none" if call.rows == 0 or call.mode.value == "partial" else "full"
        kind = "conditional" if kind == "full" and call.rows < 1 else kind
        before = kinds.get(call.step)
        kinds[call.step] = "conditional" if {before, kind} == {"full", "none"} else kind if before in (None, kind) else "tokens"
    boxes = "".join(
        f'<span data-kind="{kind}" title="step {step + 1}: {WORDS[kind]}" style="flex: 1; background: {COLORS[kind]}"></span>'
        for step, kind in kinds.items()
    )
    legend = "".join(
        f'<span><i style="background: {COLORS[kind]}"></i>{WORDS[kind]}: {[*kinds.values()].count(kind)}</span>'
        for kind in WORDS
        if kind in kinds.values()
    )
    return f'<div class="dit-steps">{boxes}</div><div class="dit-legend">{legend}</div>'
