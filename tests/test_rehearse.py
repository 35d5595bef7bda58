"""dev/rehearse.sh in its short form, and the Slurm script with fakes of Slurm's commands."""

import os
import re
import signal
import subprocess

import pytest
from helpers import ROOT, wait_until

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not (ROOT / ".venv").is_dir(), reason="dev/rehearse.sh would install a new environment")
def test_short_rehearsal(tmp_path):
    """Up to pretraining: a local server, downloads while the tokenizer trains, a kill -9 that training survives."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("NANOCHAT", "PYTEST"))}
    command = ["bash", "dev/rehearse.sh", "laptop", "--stages=6"]
    done = subprocess.run(
        command, cwd=ROOT, env=env | {"REHEARSAL_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search("rehearsal of laptop: 6 stages passed, 1 of them killed and continued", done.stdout)
    assert "base_checkpoints/d8/step_000002: resuming from here" in done.stdout
    assert (tmp_path / "base" / "base_checkpoints" / "d8" / "step_000006" / "meta.json").is_file()


SLURM = {
    "scontrol": 'if [[ $1 == show ]]; then echo node1; else echo "$@" >>scontrol.log; fi',
    # The step of the job runs until it gets a signal; --overlap stands for the step that sends it.
    "srun": """
        if [[ $1 == --overlap ]]; then kill -TERM "$(cat run.pid)"; exit; fi
        echo "$@" >srun.log
        trap 'echo saved >saved; exit 0' TERM
        echo $$ >run.pid
        [[ ! -e fails ]] || exit 3
        while true; do sleep 0.1; done
    """,
}


@pytest.mark.parametrize("ends_by", ["time limit", "error"])
def test_slurm_job(ends_by, tmp_path):
    """Before the time limit the run saves and the job is queued again; an error's exit code is the job's."""
    for name, script in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    if ends_by == "error":
        (tmp_path / "fails").touch()
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2"}
    env |= {"SLURM_JOB_NODELIST": "node[1-2]"}
    job = subprocess.Popen(["bash", ROOT / "dev/multinode/train.slurm", "--depth=32"], cwd=tmp_path, env=env)
    wait_until(lambda: (tmp_path / "run.pid").is_file() and (tmp_path / "run.pid").read_text().strip())
    if ends_by == "error":
        assert job.wait(timeout=20) == 3 and not (tmp_path / "scontrol.log").exists()
        return
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 0
    assert (tmp_path / "saved").is_file()
    assert (tmp_path / "scontrol.log").read_text() == "requeue 17\n"
    command = (tmp_path / "srun.log").read_text()
    assert command.startswith("python -m dev.launch --nnodes=2 --nproc_per_node=8 --max_restarts=3 ")
    assert command.endswith("-m scripts.base_train -- --resume --save_every=500 --keep=2 --depth=32\n")
    assert "--rdzv_id=17 --rdzv_endpoint=node1:29500" in command
