"""Downloads the public corpus: parquet shards of FineWeb-Edu from Hugging Face or the mirror NANOCHAT_HUB_URL."""

import bisect
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from nanochat.common import UserError, fetch, file_fingerprint, mirror_url, print0, repeat, require
from nanochat.tracking import progress_printer

PUBLIC = "karpathy/fineweb-edu-100b-shuffle"
LAST_SHARD = 1822  # index of the last shard of the full corpus, which is the validation shard
MAX_FAILURES = 3  # a download stops after more failed shards: the host is down or the disk is full


def shard_names(count, last):
    """File names of the last shard and of the first `count`. The last comes first: no set is usable without it."""
    return [f"shard_{index:05d}.parquet" for index in (last, *range(min(count, last)))]


def find_last_shard():
    """Index of the host's last shard. On a mirror with fewer shards than LAST_SHARD + 1 it is found by bisection."""
    print0(f"looking for the last shard at {mirror_url('hub')}")
    if not _is_missing(LAST_SHARD):
        return LAST_SHARD
    last = bisect.bisect_left(range(LAST_SHARD), True, key=_is_missing) - 1
    require(last >= 1, f"{last + 1} shards at {_url('')}, expected at least 2 (training, validation); check the URL")
    return last


def fetch_shards(folder, names, check, num_workers=4):
    """
    Download shards to `folder` in parallel; returns {name: manifest entry {"bytes", "sha256"}}.

    `check(path)` raises UserError for a damaged file. Complete files of an earlier attempt are kept and partial ones
    resumed. Raises UserError with the names of the shards that are still missing.
    """
    print0(f"downloading {len(names)} shards to {folder}")
    checked, failed, show_progress = {}, [], progress_printer("MB")
    sizes = dict.fromkeys(names)  # name -> (bytes received, file size), or None before the first block

    def progress(name, received, size):
        sizes[name] = received, size or received
        known = [pair for pair in sizes.values() if pair]
        received_mb, known_mb = (sum(column) / 1e6 for column in zip(*known, strict=True))
        expected_mb = known_mb / len(known) * len(names)  # the other shards have about the same size
        show_progress("downloading", round(received_mb), round(expected_mb), f"{len(checked)} of {len(names)} shards")

    pool = ThreadPoolExecutor(num_workers)
    jobs = {pool.submit(_fetch_shard, folder / name, check, partial(progress, name)): name for name in names}
    try:
        for job in as_completed(jobs):
            try:
                checked[jobs[job]] = job.result()
            except (UserError, OSError) as e:
                failed.append(f"{jobs[job]}: {e}")
                if len(failed) > MAX_FAILURES:
                    break
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    hint = "run `python -m nanochat.dataset` with the same flags again"
    require(not failed, f"{len(names) - len(checked)} of {len(names)} shards are missing ({'; '.join(failed)}); {hint}")
    print0(f"downloaded {len(names)} shards")
    return checked


def _fetch_shard(path, check, progress):
    """Download the shard `path` unless it exists; returns its entry. A damaged file is downloaded again, once."""
    for _ in range(2):  # a resumed download is damaged if its beginning came from another host
        if not path.exists():
            fetch(_url(path.name), path, progress=progress)
        try:
            check(path)
            return file_fingerprint(path)
        except UserError as e:
            error = e
            path.unlink()
    raise error


def _url(name):
    return f"{mirror_url('hub')}/{PUBLIC}/resolve/main/{name}"


def _is_missing(index):
    """Whether the host lacks the shard `index`. Raises UserError if the host does not answer."""
    import urllib.request

    url = _url(f"shard_{index:05d}.parquet")
    if "://" not in url:
        return not Path(url).is_file()
    try:
        repeat(lambda: urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=30).close(), url)
        return False
    except UserError as e:
        if getattr(e.__cause__, "code", None) == 404:
            return True
        raise UserError(f"{e}; `python -m nanochat.dataset --pocket` works without a network") from e
