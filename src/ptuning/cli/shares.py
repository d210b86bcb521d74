"""Options that divide a command: a part of it (K/N), and workers that share it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptuning.cli.options import AskedBackbone, among
from ptuning.errors import ConfigError
from ptuning.names import LOG_FOLDER

if TYPE_CHECKING:
    from ptuning.workers.crew import Workers
    from ptuning.workers.units import WorkPart


@dataclass(frozen=True)
class Shares:
    """How a command is divided: ``--part``, and the workers that do it."""

    part: str | None = None
    workers: int | None = None
    address: str | None = None
    gpus: float | None = None

    @property
    def own(self) -> WorkPart | None:
        """The part to do; None for all of it. A ConfigError if it is not K/N."""
        from ptuning.workers.units import WorkPart

        return None if self.part is None else WorkPart.parse(self.part)

    def crew(self, backbone: AskedBackbone, *, dry_run: bool = False) -> Workers | None:
        """Return the workers, None for none; an error if there cannot be such, before a backbone is loaded for them.
        A ``dry_run`` starts none.
        """
        if self.address is None and self.workers in (None, 1):
            if self.gpus is not None:
                raise ConfigError("--gpus-per-worker goes with --workers or --ray")
            return None
        from ptuning.workers.crew import SHARDED, Workers

        if backbone.options.shard in ("tp", "layers"):
            raise ConfigError(SHARDED)
        found = Workers(self.workers, self.address, self.gpus, backbone.options)
        if not dry_run:
            found.check()
        return found

    def log_folder(self, out: Path) -> Path:
        """Return where logs go: each part has its own, since several may be written at once."""
        return out / LOG_FOLDER / (f"part-{self.own}".replace("/", "-of-") if self.own is not None else "")


def shares_of(
    part: Annotated[
        str | None, typer.Option(metavar="K/N", help="Do only the K-th of N parts; without it, parts are collected.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Processes with a backbone each; needs ptuning[ray].", min=1)
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT|auto", help="The Ray cluster that has them.", autocompletion=among("auto")),
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(metavar="F", help="Such as 0.25: four workers on a GPU.")
    ] = None,
) -> Shares:
    """Collect how a command is divided; commands take it with :func:`ptuning.cli.options.takes`."""
    return Shares(part, workers, ray, gpus_per_worker)
