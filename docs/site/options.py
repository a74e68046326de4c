"""Print the page of the site that lists every option of the configurations, from their fields."""

from __future__ import annotations

from dit_accel.pipelines.methods import METHODS
from dit_accel.pipelines.options import KNOBS

print("# Options")
for method, config in METHODS.items():
    flags = {fields[method].name: f"`--{name.replace('_', '-')}`" for name, fields in KNOBS.items() if method in fields}
    print(f"\n## `{config.__name__}`: `--method {method}`\n\n| option | command line | default | |\n| --- | --- | --- | --- |")
    for name, field in config.__dataclass_fields__.items():
        text = field.metadata["help"].replace("|", "\\|")
        print(f"| `{name}` | {flags.get(name, '')} | `{field.default!r}` | {text} |")
