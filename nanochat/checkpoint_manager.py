"""
Checkpoints: written atomically, verified when read, resumable on any number of processes.

    <base dir>/base_checkpoints/d20/step_021400/   model.safetensors  optim_rank0.pt ...  meta.json
                                                   (likewise mid_checkpoints, chatsft_checkpoints, chatrl_checkpoints)

A checkpoint is written to step_XXXXXX.tmp, synced and renamed. meta.json holds the state that resumes the run, size
and sha256 of the other files, and the sha256 of its own content. Reading verifies them and falls back, with a warning,
to the newest intact step.
"""

import contextlib
import hashlib
import json
import pickle
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch
from safetensors.torch import load_file, save_file

from nanochat import cluster, common
from nanochat.common import FOLDERS, Compute, UserError, base_dir, print0, require
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import check_tokenizer, get_tokenizer

SCRIPTS = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}


def checkpoint_dir(source, model_tag):
    return base_dir() / FOLDERS[source] / model_tag


def step_dirs(folder):
    """{step: path} of the complete checkpoints in `folder`."""
    steps = {path: re.fullmatch(r"step_(\d+)", path.name) for path in folder.glob("step_*")}
    return {int(match[1]): path for path, match in steps.items() if match and path.is_dir()}


def lock(folder):
    """The acquired lock of a model's folder. Raises UserError if another process trains this model."""
    import filelock

    path = base_dir() / f".{folder.parent.name}.{folder.name}.lock"
    lock = filelock.FileLock(path, timeout=0, is_singleton=True)
    with common.write_errors(path), contextlib.suppress(NotImplementedError):  # a file system without locks
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(f"another process is training {folder}; wait, or choose another --model_tag") from None
    return lock


def save_checkpoint(folder, step, model, optimizers, meta, compute, keep=0):
    """
    Write `folder`/step_<step> and return its path. All ranks call it; each writes its shard of the optimizer state.

    Hosts without a shared disk send each other their shards, so that each has the whole checkpoint. `meta` must be
    JSON-serializable; step, model_config and checksums are added. Only the newest `keep` checkpoints are kept (0 =
    all). If a rank cannot write, the draft is deleted and all ranks raise the same UserError.
    """
    final, draft = folder / f"step_{step:06d}", folder / f"step_{step:06d}.tmp"
    with _on_all_ranks(compute, draft):
        if compute.writes:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
    with _on_all_ranks(compute, draft), ThreadPoolExecutor() as pool:
        jobs = {}  # the pool syncs each file and computes its fingerprint while the next one is written
        if optimizers:
            path = draft / f"optim_rank{compute.rank}.pt"
            torch.save([optimizer.state_shard() for optimizer in optimizers], path)
            jobs[path.name] = pool.submit(common.sync, path), pool.submit(common.file_fingerprint, path)
        if compute.writes:
            path = draft / "model.safetensors"
            save_file({n: p.detach().cpu().contiguous() for n, p in model.state_dict().items()}, path)
            jobs[path.name] = pool.submit(common.sync, path), pool.submit(common.file_fingerprint, path)
        own_files = {name: [job.result() for job in pair][1] for name, pair in jobs.items()}
    files = {name: fingerprint for part in compute.all_gather(own_files) for name, fingerprint in part.items()}
    with _on_all_ranks(compute, draft):
        if compute.writes:
            if compute.writers:
                cluster.exchange_files(draft, compute.writers)
            made_by = {"world_size": compute.world_size, "torch_version": torch.__version__}
            meta = {"step": step, "model_config": asdict(model.config), **made_by, **meta, "files": files}
            (draft / "meta.json").write_text(_with_digest(meta), encoding="utf-8")
            _publish(draft, final)
            for old in sorted(step_dirs(folder))[:-keep] if keep > 0 else ():
                shutil.rmtree(folder / f"step_{old:06d}")
    return final


@contextlib.contextmanager
def _on_all_ranks(compute, draft):
    """Context manager of one phase of a save; it ends on all ranks together, with the first rank's write error."""
    error = None
    try:
        with common.write_errors(draft.with_suffix(""), "then continue with --resume; earlier checkpoints are intact"):
            yield
    except UserError as e:
        error = e
    if errors := list(filter(None, compute.all_gather(error))):
        if compute.writes:
            shutil.rmtree(draft, ignore_errors=True)
        raise errors[0]


def _publish(draft, final):
    """Sync the files of the folder `draft` and rename it to `final`, which it replaces."""
    for path in [*draft.iterdir(), draft]:
        common.sync(path)
    shutil.rmtree(final, ignore_errors=True)
    draft.replace(final)
    common.sync(final.parent)


def update_meta(path, compute, **values):
    """Add `values` to a saved checkpoint's meta.json, e.g. its validation loss."""
    if compute.writes:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        common.write_text(path / "meta.json", _with_digest(meta | values))


def _with_digest(meta):
    """Text of meta.json: `meta` and the digest of the rest, which every later write replaces."""
    meta = {name: value for name, value in meta.items() if name != "sha256"}
    return json.dumps(meta | {"sha256": hashlib.sha256(json.dumps(meta).encode()).hexdigest()}, indent=1) + "\n"


def _read_meta(path):
    """Content of meta.json, after verifying all files. Raises UserError that names the damaged or missing file."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        files, _ = meta["files"], meta["model_config"]
    except FileNotFoundError:
        raise UserError(f"{path} has no meta.json") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path / 'meta.json'} is damaged") from None
    edited = "sha256" in meta and meta["sha256"] not in _with_digest(meta)
    require(not edited, f"{path / 'meta.json'} is damaged; if you have edited it, delete its sha256")
    for name, expected in files.items():
        require((path / name).is_file(), f"{path / name} is missing")
        same_size = (path / name).stat().st_size == expected["bytes"]  # else the sha256 need not be computed
        require(same_size and common.file_fingerprint(path / name) == expected, f"{path / name} is damaged")
    return meta


def find_checkpoint(folder, step=None, compute=None):
    """
    (path, meta) of the checkpoint of `step`, or by default of the newest intact one.

    With `compute`, all ranks call it and get the same step, also on hosts without a shared disk. Prints a warning if
    newer checkpoints are damaged. Raises UserError if there is no checkpoint, or if the one of `step` is missing or
    damaged.
    """
    if compute and compute.writers:
        step = _share_checkpoint(folder, step, compute)
    steps = step_dirs(folder)
    if step is not None:
        available = ", ".join(map(str, sorted(steps))) or "none"
        require(step in steps, f"no checkpoint of step {step} in {folder} (available: {available})")
        return steps[step], _read_meta(steps[step])
    problems = []
    for s in sorted(steps, reverse=True):
        try:
            meta = _read_meta(steps[s])
            if problems:
                print0(f"warning: {'; '.join(problems)}; using step {s} instead", file=sys.stderr)
            return steps[s], meta
        except UserError as e:
            problems.append(str(e))
    require(not problems, f"no intact checkpoint in {folder}: {'; '.join(problems)}; copy or train it again")
    models = ", ".join(path.name for path in _model_folders(folder.parent))
    raise UserError(f"no checkpoint in {folder}{models and '; there are checkpoints of ' + models}")


def _share_checkpoint(folder, step, compute):
    """The step that all hosts use: `step`, or the newest intact one. Hosts that lack it get a copy. Collective."""
    own = None
    with contextlib.suppress(UserError):
        own = find_checkpoint(folder, step)[1]
    found = compute.all_gather(own and (own["step"], own.get("run")))
    intact = sorted(filter(None, found))
    if not intact:
        return step
    different_runs = f"the hosts' checkpoints in {folder} are of different runs; rename the folder where it is outdated"
    require(len({run for _, run in intact}) == 1, different_runs)
    step = intact[-1][0]
    final, draft = folder / f"step_{step:06d}", folder / f"step_{step:06d}.tmp"
    if set(found) != {intact[-1]}:
        with _on_all_ranks(compute, draft):
            if compute.writes and own and own["step"] == step:
                cluster.exchange_files(final, compute.writers)
            elif compute.writes:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
                cluster.exchange_files(draft, compute.writers)
                _publish(draft, final)
        print0(f"{final}: copied to the hosts that lacked it")
    return step


def _model_folders(root):
    """Folders of a stage's models that have checkpoints, sorted by name; without those that were set aside."""
    return sorted(path for path in root.glob("*") if step_dirs(path) and not re.search(r"\.old\d+$", path.name))


def find_model_tag(source, compute=None):
    """Default model tag: the deepest d<depth>, else the most recently saved. Raises UserError if there is none."""
    root = base_dir() / FOLDERS[source]
    own = {path.name: path.stat().st_mtime for path in _model_folders(root)}
    tags = {tag: time for part in (compute.all_gather(own) if compute else [own]) for tag, time in part.items()}
    require(tags, f"no {source} checkpoint in {root}; make one with `python -m scripts.{SCRIPTS[source]}`")
    depths = {int(m[1]): tag for tag in tags if (m := re.fullmatch(r"d(\d+)", tag))}
    return depths[max(depths)] if depths else max(tags, key=tags.get)


def load_weights(model, path):
    """Load a verified checkpoint's weights into `model`."""
    weights = load_file(path / "model.safetensors", device=str(model.get_device()))
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
    problem = f"{path / 'model.safetensors'} does not fit the model that meta.json describes"
    require({n: tuple(w.shape) for n, w in weights.items()} == expected, problem)
    model.load_state_dict(weights)


def load_optimizers(path, meta, optimizers):
    """Load optimizer state that any number of ranks has saved. Raises UserError if the checkpoint has none."""
    names = [f"optim_rank{r}.pt" for r in range(meta["world_size"])]
    require(meta["files"].keys() >= set(names), f"{path} has no optimizer state, so a run cannot resume from it")
    try:
        saved = [torch.load(path / n, map_location="cpu", weights_only=True) for n in names]
    except (RuntimeError, pickle.UnpicklingError, EOFError) as e:
        raise UserError(f"{path}: the optimizer state cannot be read ({str(e).splitlines()[0]})") from e
    for i, optimizer in enumerate(optimizers):
        optimizer.load_shards([shards[i] for shards in saved])


def load_model(source, device, phase="eval", model_tag=None, step=None, quantize=None):
    """
    (model, tokenizer, meta) of a stage: `source` is "base", "mid", "sft" or "rl". `device`: a Compute, or a device.

    By default it loads the newest step of the deepest model. Phase "eval" casts the weights to compute.dtype and
    freezes them; quantize="int8" also quantizes them for the CPU backend. Raises UserError if there is no such
    checkpoint, or if it was trained with another tokenizer. Warns if the checkpoint has no fingerprints.
    """
    require(source in FOLDERS, f"source {source!r}: choose one of {', '.join(FOLDERS)}")
    require(phase in ("train", "eval"), f'phase {phase!r}: choose "train" or "eval"')
    if not isinstance(compute := device, Compute):
        device = torch.device(device)
        compute = Compute(device, common.choose_dtype(common.choose_device(device.type)))
    model_tag = model_tag or find_model_tag(source, compute)
    path, meta = find_checkpoint(checkpoint_dir(source, model_tag), step, compute)
    tokenizer = get_tokenizer()
    if origins := meta.get("made_from"):
        check_tokenizer(tokenizer.fingerprint(), origins["tokenizer"], path)
    else:
        print0(f"warning: {path} does not record its tokenizer and data; the present ones may differ", file=sys.stderr)
    try:
        config = GPTConfig(**meta["model_config"])
    except TypeError as e:
        raise UserError(f"{path} holds the model of another version: {e}") from e
    size = tokenizer.get_vocab_size()  # a checkpoint without fingerprints may have another
    sizes = f"with a vocabulary of {config.vocab_size:,}, {base_dir() / 'tokenizer'} has {size:,}"
    require(size == config.vocab_size, f"{path} was trained {sizes}; retrain one of them")
    model = GPT(config)
    model.allocate(compute.device)
    load_weights(model, path)
    if phase == "eval":
        model.to(dtype=torch.float32 if quantize else compute.dtype).eval().requires_grad_(False)
    if quantize:
        from nanochat.inference.cpu_backend import quantize as to_int8

        require(compute.device.type == "cpu", f"--quantize={quantize} works on CPUs only; leave it out")
        to_int8(model)
    # The corpus was "data" before version 0.3.
    return model, tokenizer, meta | {"model_tag": model_tag, "corpus": meta.get("corpus", meta.get("data", "public"))}


def made_from(source_meta, tokenizer, task):
    """What a mid, sft or rl checkpoint is made from: fingerprints by name. `source_meta`: of the loaded model."""
    shards = (source_meta.get("made_from") or {}).get("shards")
    weights = source_meta["files"]["model.safetensors"]["sha256"]
    return {"tokenizer": tokenizer.fingerprint(), "model": weights, "shards": shards, "mixture": task.fingerprint()}
