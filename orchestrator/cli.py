"""The command line: parses, wires and delegates.

Exit status 0: all cells ok or non-finite; 1: some failed; 2: bad input; 130: interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from orchestrator import __version__
from orchestrator.errors import BitatlasError

OK, SOME_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class _Path(click.Path):
    """A path. An empty one, such as a variable leaves that is not set, would mean the current directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; a usage error where it is empty."""
        if value == "":
            self.fail("it is empty; give a path", param, ctx)
        return super().convert(value, param, ctx)


_PATH = _Path(path_type=Path)
_SWEEP = click.argument("sweep_file", metavar="SWEEP.yaml", type=_PATH)
_OUT = click.option("--out", type=_PATH, help="Output directory; outputs/<name> if not given.")
_ADDRESS = click.option(
    "--address",
    help="HOST:PORT of a running Ray cluster to join. If not given: inside a submitted Ray job its own cluster, else a "
    "local one is started.",
)
_WORKERS = click.option(
    "--workers", type=click.IntRange(min=1), help="Number of workers, instead of workers.count of the file."
)
_CACHE = click.option(
    "--cache",
    metavar="DIR",
    type=_PATH,
    help="Directory in which sweeps find each other's equal work: artifacts, statistics and measured outcomes, by "
    "content. Give the same DIR to sweeps that overlap, and only the first does what they share.",
)
_DIRECTORY = click.argument("directory", metavar="DIR", type=_PATH)


def main() -> NoReturn:
    """Entry point of the `bitatlas` script: user errors become one line on stderr and exit status 2."""
    try:
        sys.exit(bitatlas.main(standalone_mode=False) or OK)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(BAD_INPUT)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except Exception as error:
        from cluster.ascend import backend_trouble
        from cluster.errors import ClusterError

        told = str(error) if isinstance(error, BitatlasError | ClusterError) else backend_trouble(error)
        if told is None:
            raise
        click.echo(f"bitatlas: {told}", err=True)
        sys.exit(BAD_INPUT)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="bitatlas")
def bitatlas() -> None:
    """Measure which quantization of a language model to deploy.

    A sweep file names models, a grid of method x bit-width, and what to measure. `bitatlas run` quantizes and evaluates
    every cell on the NPUs, GPUs or CPU cores of a Ray cluster, streams rows into Parquet, and resumes where it stopped;
    `bitatlas report` draws the map. Start with `bitatlas demo`.
    """


@bitatlas.command()
@_OUT
def demo(out: Path | None) -> int:
    """Run the embedded default: a real model and real data from installed packages.

    Quantizes SmolLM2-135M by all seven methods (8 to 1 bits), measures perplexity and two tasks, prints the map and
    writes outputs/demo. Needs no internet, account or accelerator; some minutes on two cores.
    """
    from orchestrator.commands import run_command

    return run_command(Path(__file__).parent / "sweeps" / "demo.yaml", out=out, report=True)


@bitatlas.command()
@_SWEEP
@_OUT
@click.option(
    "--outline",
    is_flag=True,
    help="Plan from configurations alone, before weights and data are there: nothing but a config.json is fetched.",
)
def plan(sweep_file: Path, out: Path | None, outline: bool) -> int:
    """Show what a sweep, or a search, would do, and do nothing.

    Lists cells, jobs, what is done already in the output directory, the size of every checkpoint, the estimated time
    with what it rests on (a nominal rate, or jobs seen on this device), a worker's memory and the disk's share; of a
    search file the bank, the budgets in bytes, and how long each part may take.
    """
    from orchestrator.commands import plan_command

    return plan_command(sweep_file, out=out, outline=outline)


@bitatlas.command()
@_SWEEP
@_OUT
@_ADDRESS
@_WORKERS
@_CACHE
@click.option("--report/--no-report", default=True, help="Print the map and write the page at the end.")
def run(
    sweep_file: Path, out: Path | None, address: str | None, workers: int | None, cache: Path | None, *, report: bool
) -> int:
    """Start a sweep, or resume it: the same command does only what is missing.

    Rows stream into DIR/results, items, layers and events as Parquet, readable by anything at any time. Ctrl-C stops
    cleanly and keeps what is done. Exit status: 0 all cells ok or non-finite, 1 some failed, 2 bad input.
    """
    from orchestrator.commands import run_command

    return run_command(sweep_file, out=out, address=address, workers=workers, cache=cache, report=report)


@bitatlas.command()
@_DIRECTORY
@click.option("--watch", is_flag=True, help="Show it in place, anew every two seconds, until the sweep ends or Ctrl-C.")
def status(directory: Path, watch: bool) -> int:
    """Show progress and failures of a running or finished sweep, from its files alone.

    Works on any machine that sees the output directory; it talks to no cluster, and Ctrl-C ends the watching alone.
    """
    from orchestrator.commands import status_command

    return status_command(directory, watch=watch)


@bitatlas.command()
@_DIRECTORY
def report(directory: Path) -> int:
    """Print the accuracy map of a sweep, and write atlas.html and atlas.md into its directory.

    Works while the sweep is running. The page is one self-contained file.
    """
    from orchestrator.commands import report_command

    return report_command(directory)


@bitatlas.command()
@_DIRECTORY
@click.argument("cell", metavar="CELL")
@click.option("--format", "form", required=True, type=click.Choice(["dense"]), help="Checkpoint format to write.")
@click.option("--to", required=True, type=_PATH, help="Directory to write; must not exist.")
def export(directory: Path, cell: str, form: str, to: Path) -> int:
    """Write the checkpoint of one cell of a sweep.

    CELL is a cell_id as in the report's table. Format `dense` is a safetensors checkpoint in the model's own dtype
    whose weights are exactly the evaluated ones; any transformers version loads it.
    """
    from orchestrator.commands import export_command

    return export_command(directory, cell, form, to)


@bitatlas.group("cluster")
def cluster_group() -> None:
    """Files that start a Ray cluster of Ascend NPUs, for a sweep to run on with `bitatlas run --address`.

    One description says what there is (servers, NPUs, image, versions, where the token is); everything that starts and
    watches the cluster is rendered from it, so that names, ports and counts agree. See docs/ascend-cluster.md.
    """


@cluster_group.command()
@click.argument("description", metavar="DESCRIPTION.yaml", type=_PATH)
@click.option("--to", required=True, type=_PATH, help="Directory to write; may hold an earlier rendering, not changed.")
def render(description: Path, to: Path) -> int:
    """Render the files of a cluster from its description: it starts nothing, and talks to nobody.

    Writes STEPS.md, the commands with this cluster's names; for hosts bare-metal/ray-up.yaml (Ray's launcher) and
    prometheus.yml; for Kubernetes Dockerfile, raycluster.yaml (KubeRay) and prometheus.yml. Unknown keys are refused
    with the nearest known one. The token is in none of the files: they say where it is kept.

    \b
    A description, with every default left out:
      name: atlas
      shared_directory: /shared
      bare_metal:
        ssh_user: bitatlas
        nodes:
          - {address: 10.0.0.1, npus: 8}
    Longer ones are in the package, under cluster/deploy/examples. Change the description and render again: a rendered
    file that was changed by hand is never overwritten.
    """
    from orchestrator.commands import render_command

    return render_command(description, to)


@bitatlas.command()
@click.argument("sweep_file", metavar="[SWEEP.yaml]", type=_PATH, required=False)
@click.option("--out", type=_PATH, help="Directory in which the sweep will write; is it seen by every node?")
@click.option("--address", help="HOST:PORT of a running Ray cluster, whose nodes are looked at too.")
@_WORKERS
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of findings: subject, found, remedy, fatal.")
def doctor(
    sweep_file: Path | None, out: Path | None, address: str | None, workers: int | None, *, as_json: bool
) -> int:
    """Show what this machine and a cluster can do, and what to mend.

    Looks at Python, torch, devices and their memory, Ascend's driver, CANN and torch_npu (loaded in a process of its
    own), packages, the nodes of a Ray cluster with their clocks, directories, and disks; with SWEEP.yaml (or a search
    file) also for its models, data and workers. Nothing is started or changed. Exit status 1 where a sweep would fail.
    """
    from orchestrator.doctor.command import doctor_command

    return doctor_command(sweep_file, out=out, address=address, workers=workers, as_json=as_json)


@bitatlas.command()
@click.argument("search_file", metavar="SEARCH.yaml", type=_PATH)
@_OUT
@_ADDRESS
@_WORKERS
@_CACHE
@click.option("--report/--no-report", default=True, help="Print the map and write the page at the end.")
def search(
    search_file: Path, out: Path | None, address: str | None, workers: int | None, cache: Path | None, *, report: bool
) -> int:
    """Search per-layer mixed bit-widths under a size budget, or go on with a search.

    SEARCH.yaml is a sweep file with a section `search`: a bank (one method, several weight_bits), budgets in stored
    bits per weight, and how long to search. Every linear is quantized once per choice; allocations of these variants
    are then measured in memory by all workers, guided by an Optuna sampler; the best one on held-out windows is
    quantized in sequence and evaluated in full, as a cell beside the uniform ones of `grid`. See docs/search.md.

    \b
      DIR/search/study.journal  every trial; `optuna-dashboard DIR/search/study.journal` shows it
      DIR/search/trials, sensitivity  the same as Parquet
      DIR/search/chosen.json    the allocations found, with their cells
      DIR/atlas.html            the report, with the allocation of each layer

    Ctrl-C or a crash loses at most the generation at work: the same command goes on.
    """
    from orchestrator.search.command import search_command

    return search_command(search_file, out=out, address=address, workers=workers, cache=cache, report=report)


@bitatlas.command()
@_SWEEP
@click.option("--to", required=True, type=_PATH, help="Directory to fill; may hold a bundle.")
def fetch(sweep_file: Path, to: Path) -> int:
    """Gather what a sweep, or a search, needs, on a connected machine, for one without internet.

    Gets models by Hub id (safetensors, configuration and tokenizer; no pickles, no code), the data sets of tasks and
    corpora, and copies of the files that the sweep names by path, into DIR, with bundle.json: size and sha256 of every
    file. Packaged models and data need no fetching. An interrupted fetch goes on when it is called again, and several
    sweeps may share a DIR. Gated models: log in first (`hf auth login`, or HF_TOKEN).

    \b
    Then, on the other machine:
      copy DIR with its links (rsync -a, cp -a or tar), and the sweep file beside it;
      add `data: DIR` to the sweep file, and `bitatlas run` it. The bundle is verified, and nothing else is read.
    """
    from orchestrator.commands import fetch_command

    return fetch_command(sweep_file, to)


if __name__ == "__main__":
    main()
