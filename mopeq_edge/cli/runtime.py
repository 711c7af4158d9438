"""``mopeq-edge runtime``: install llama.cpp, show what is installed, patch a llama.cpp of one's own."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mopeq_edge.cli.console import json_option

if TYPE_CHECKING:
    from mopeq_edge.runtime.info import RuntimeInfo


@click.group()
def runtime() -> None:
    """Install llama.cpp and show what is installed.

    mopeq-edge builds the llama.cpp release that its Python binding was made for, with a patch that lets the
    experts of a layer have different types, and keeps it in ~/.cache/mopeq-edge, or in the directory that
    MOPEQ_EDGE_CACHE names. Every other file runs in it as in the stock llama.cpp.

    \b
    Example:
      mopeq-edge runtime install
    """


@runtime.command()
@click.option("--jobs", type=click.IntRange(min=1), help="Compilers that run at once (default: one per CPU).")
@click.option("--force", is_flag=True, help="Build again even if it is installed.")
@click.option("--stock", is_flag=True, help="Without the patch, to compare with; both builds can be installed.")
@click.option("--cuda", is_flag=True, help="For NVIDIA GPUs; needs the CUDA toolkit.")
@click.option(
    "--cuda-arch",
    metavar="N",
    help="With --cuda: the GPU's compute capability, 87 for Jetson Orin (default: this machine's, from nvidia-smi).",
)
@click.option(
    "--sdist",
    type=click.Path(exists=True, path_type=Path),
    help="Source distribution of llama-cpp-python, archive or directory, instead of a download.",
)
def install(jobs: int | None, force: bool, stock: bool, cuda: bool, cuda_arch: str | None, sdist: Path | None) -> None:
    """Build llama.cpp: tools, libraries and its converter.

    Needs a C++ compiler, cmake and about 0.6 GB of disk while it builds; 5 to 15 minutes, with --cuda longer.

    \b
    Example:
      mopeq-edge runtime install --cuda --cuda-arch 87
    """
    from mopeq_edge.cli.console import console_progress
    from mopeq_edge.llama_cpp.bundle import STOCK, build_name
    from mopeq_edge.llama_cpp.tree import apply_patches
    from mopeq_edge.runtime.gpu import cuda_backend
    from mopeq_edge.runtime.install import install as install_runtime
    from mopeq_edge.runtime.locate import CPU

    if cuda_arch is not None and not cuda:
        raise click.UsageError("--cuda-arch goes with --cuda")
    build = STOCK if stock else build_name()
    backend = cuda_backend(cuda_arch) if cuda else CPU
    prepare = None if build == STOCK else apply_patches
    with console_progress() as progress:
        done = install_runtime(
            progress, jobs=jobs, force=force, sdist=sdist, build=build, backend=backend, prepare=prepare
        )
    click.echo(f"llama.cpp of llama-cpp-python {done.version} ({done.build_id}) is in {done.directory}")


@runtime.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Only say whether the patch fits; change nothing.")
@click.option("--reverse", is_flag=True, help="Take the patch out again.")
def patch(directory: Path, check: bool, reverse: bool) -> None:
    """Patch a llama.cpp of your own, so that it runs per-expert files.

    DIR is the root of llama.cpp's source. All of the patch is applied or nothing is changed.

    \b
    Example:
      mopeq-edge runtime patch ~/llama.cpp --check
    """
    from mopeq_edge.llama_cpp.tree import apply_patches

    done = apply_patches(directory, check=check, reverse=reverse)
    if done.already:
        state = "has no patch in it" if reverse else "is patched already"
        click.echo(f"{directory}: {state}; nothing was changed")
        return
    added, removed = (sum(getattr(change, side) for change in done.changes) for side in ("added", "removed"))
    size = f"{len(done.changes)} files, {added} lines added, {removed} removed"
    if check:
        state = "can be taken out" if reverse else "fits"
        click.echo(f"{directory}: the patch {state} ({size}); nothing was changed")
        return
    click.echo(f"{directory}: {'unpatched' if reverse else 'patched'}: {size}")
    source, build, binaries = (shlex.quote(str(directory / part)) for part in ("", "build", "build/bin"))
    cmake = f"cmake -S {source} -B {build} -DCMAKE_BUILD_TYPE=Release && cmake --build {build} -j"
    click.echo(f"Build it as before, or with: {cmake}")
    if not reverse:
        click.echo(f"mopeq-edge run and serve use it with: export LLAMA_CPP_LIB_PATH={binaries}")


@runtime.command()
@json_option
def info(as_json: bool) -> None:
    """Show the installed llama.cpp, its tools and the libraries in use.

    \b
    Example:
      mopeq-edge runtime info
    """
    from mopeq_edge.cli.console import print_json
    from mopeq_edge.runtime.info import collect_info

    found = collect_info()
    if as_json:
        print_json(_as_dict(found))
        return
    # no table: paths are there to be copied
    rows = _rows(found)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


def _as_dict(found: RuntimeInfo) -> dict[str, object]:
    installed = found.runtime
    return {
        "binding_matches": found.binding_matches,
        "binding_version": found.binding_version,
        "build": installed.build_id if installed else None,
        "builds": {build.build_id: what for build, what in found.builds},
        "cache": str(found.cache),
        "directory": str(installed.directory) if installed else None,
        "installed": installed is not None,
        "library_dir": str(found.library_dir) if found.library_dir else None,
        "library_error": found.library_error,
        "others": list(found.others),
        "runs_expert_groups": found.runs_expert_groups,
        "tools": {
            tool.name: {"path": str(tool.path) if tool.path else None, "version": tool.version} for tool in found.tools
        },
        "version": installed.version if installed else None,
    }


def _rows(found: RuntimeInfo) -> list[tuple[str, str]]:
    installed = found.runtime
    matches = {
        True: "matches the libraries",
        False: "has no libraries to load",
        None: "LLAMA_CPP_LIB_PATH is set: cannot tell whether it matches the libraries",
    }[found.binding_matches]
    remedy = "unset LLAMA_CPP_LIB_PATH" if found.library_chosen else "run: mopeq-edge runtime install"
    rows = [
        ("version", installed.version if installed else "not installed; run: mopeq-edge runtime install"),
        ("build", installed.build_id if installed else "-"),
        ("directory", str(installed.directory) if installed else "-"),
    ]
    rows += [(tool.name, "MISSING" if tool.path is None else tool.version or "present") for tool in found.tools]
    rows += [
        ("libraries", str(found.library_dir or found.library_error)),
        ("binding", f"llama-cpp-python {found.binding_version}: {matches}"),
        ("per-expert files", "run with these libraries" if found.runs_expert_groups else f"do not run: {remedy}"),
    ]
    rows += [
        ("installed", f"{build.build_id}, {what}{', in use' if build == installed else ''}")
        for build, what in found.builds
    ]
    return rows + [("also there", name) for name in found.others]
