"""
Watch runs: a local page with the curves, samples and scores of the runs in one or several base directories.

    python -m nanochat.watch                      # the base directory; works while training and afterwards
    python -m nanochat.watch ~/.cache/a ~/b       # others, laid over each other

The page asks every second for what has changed in the files below report/, see nanochat/tracking.py. report.html, made
by `python -m nanochat.report generate`, is the same page with these files inside.
"""

import contextlib
from pathlib import Path

from nanochat.cli import listen, make_parser, parse_args, path, run_script, server_url
from nanochat.common import base_dir, print0, require
from nanochat.pages import html_page, page_headers

FILES = ("*.json", "*.md", "runs/*.json", "metrics/*.jsonl", "samples/*.jsonl")


def runs(folders):
    """{name: folder of a report} of the runs in base directories: the current one, earlier ones, those of sweeps."""
    found, folders = {}, [Path(folder) for folder in folders]
    for folder in folders:
        unique = sum(other.name == folder.name for other in folders) == 1
        prefix = f"{folder.name if unique else folder} " if len(folders) > 1 else ""
        reports = {folder / "report": "" if prefix else "newest"}
        for report in sorted(folder.glob("report/earlier/*"), reverse=True):
            reports[report] = f"earlier {report.name}"
        for report in sorted([*folder.glob("*/report"), *folder.glob("sweeps/*/*/report")]):
            reports[report] = report.parent.relative_to(folder).as_posix().removeprefix("sweeps/")
        found |= {f"{prefix}{name}".strip(): report for report, name in reports.items() if report.is_dir()}
    return found


def read_change(key, file, size, version):
    """The entry of changes() for a file of which `size` bytes in `version` are known; None if there is nothing new."""
    stat, lines = file.stat(), file.suffix == ".jsonl"
    new_version = f"{stat.st_ino} {0 if lines else stat.st_mtime_ns}"
    if (size, version) == (stat.st_size, new_version):
        return None
    start = size if lines and version == new_version and size < stat.st_size else 0
    with open(file, "rb") as f:
        f.seek(start)
        data = f.read()
    data = data[: data.rfind(b"\n") + 1] if lines else data  # the last line may be incomplete
    if not data and version == new_version:
        return None
    entry = {"key": key, "version": new_version, "start": start, "size": start + len(data)}
    return entry | {"text": data.decode("utf-8", "replace")}


def changes(folders, known):
    """
    The files of all runs that differ from `known`, {key: [size, version]}.

    A list of {"key", "run", "file", "start", "size", "version", "text"}. Of a file of lines, only whole new ones are
    sent: `text` begins at byte `start`.
    """
    changed = []
    for run, report in runs(folders).items():
        for file in sorted(file for pattern in FILES for file in report.glob(pattern) if file.name != "report.md"):
            name = file.relative_to(report).as_posix()
            key = f"{run}: {name}"
            with contextlib.suppress(OSError):  # moved meanwhile, to report/earlier/
                if entry := read_change(key, file, *known.get(key, (0, None))):
                    changed.append(entry | {"run": run, "file": name})
    return changed


def create_app(folders):
    """The FastAPI application that shows the runs of `folders`."""
    from fastapi import FastAPI
    from fastapi.responses import HTMLResponse, JSONResponse

    app, html = FastAPI(openapi_url=None), html_page("watch.html")

    @app.get("/")
    def show():
        return HTMLResponse(html, headers=page_headers(html))

    @app.post("/changes")
    def send(known: dict[str, tuple[int, str]]):
        return JSONResponse(changes(folders, known))

    return app


def main(argv=None):
    parser = make_parser("nanochat.watch", __doc__)
    parser.add_argument("folders", nargs="*", type=path, help="base directories (default: NANOCHAT_BASE_DIR)")
    parser.add_argument("-p", "--port", type=int, default=8001, help="0 = any free port (default 8001)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 = reachable from other machines")
    args = parse_args(parser, argv)
    for folder in args.folders:
        require(Path(folder).is_dir(), f"no folder {folder}")
    import uvicorn

    sock = listen(args.host, args.port)
    print0(f"open {server_url(sock)}; Ctrl-C ends it")
    app = create_app(args.folders or [base_dir()])
    uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none")).run(sockets=[sock])


if __name__ == "__main__":
    run_script(main)
