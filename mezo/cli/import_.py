"""`mezo import`: an adapter of someone else's."""

import dataclasses

import tyro


@dataclasses.dataclass(frozen=True)
class _ImportOptions:
    """Make an adapter from elsewhere (LoRA or prefix, any dtype) ready for `mezo train --adapter`."""

    adapter: tyro.conf.Positional[str]
    """PEFT adapter directory."""
    output_dir: str
    """Adapter directory to create."""


def main(argv: list[str]) -> int:
    options = tyro.cli(_ImportOptions, args=argv, prog="mezo import")
    from mezo.run.export import import_adapter

    import_adapter(options.adapter, options.output_dir)
    print(f"imported {options.adapter}; start from it with: mezo train --adapter {options.output_dir}")
    return 0
