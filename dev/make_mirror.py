"""
Generate small files of random words with the schemas of all public data, laid out like the public hosts.

    python -m dev.make_mirror <folder>

Serve the folder and point NANOCHAT_HUB_URL and NANOCHAT_GITHUB_URL at it, NANOCHAT_BUCKET_URL at its karpathy-public/.
"""

import csv
import io
import json
import random
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

WORDS = (
    "the a sun sea cat dog old red tall quiet house river bread winter runs sees likes finds and but with under".split()
)
rng = random.Random(0)


def text(n):
    return " ".join(rng.choice(WORDS) for _ in range(n))


def conversation():
    return [{"role": role, "content": text(8)} for role in ("user", "assistant") * 2]


def write_table(folder, repo, name, rows):
    path = folder / repo / "resolve" / "main" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=max(1, len(rows) // 4))


def question(i):
    return {"question": text(8), "subject": "words", "choices": [text(2) for _ in range(4)], "answer": i % 4}


def arc(i):
    choices = {"text": [text(2) for _ in range(4)], "label": list("ABCD")}
    return {"id": f"q{i}", "question": text(8), "choices": choices, "answerKey": "ABCD"[i % 4]}


def gsm8k(i):
    return {"question": f"{text(8)} {i} and {i}?", "answer": f"{text(4)} <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}


def humaneval(i):
    prompt = f'def f{i}(x):\n    """Returns x + {i}."""\n'
    test = f"def check(candidate):\n    assert candidate(1) == {i + 1}\n"
    solution = {"canonical_solution": f"    return x + {i}\n", "test": test, "entry_point": f"f{i}"}
    return {"task_id": f"HumanEval/{i}", "prompt": prompt, **solution}


def write_bundle(path, n=32):
    """The evaluation bundle, with one task of each kind."""
    rows = {
        "multiple_choice": [{"query": text(8), "choices": [text(3), text(3)], "gold": i % 2} for i in range(n)],
        "schema": [{"context_options": [text(6), text(6)], "continuation": text(3), "gold": i % 2} for i in range(n)],
        "language_modeling": [{"context": text(8), "continuation": text(2)} for _ in range(n)],
    }
    tasks = [
        {"label": kind, "dataset_uri": f"{kind}.jsonl", "num_fewshot": [2], "icl_task_type": kind} for kind in rows
    ]
    table = io.StringIO()
    csv.writer(table).writerows([["Eval Task", "Random baseline"], *([kind, 0] for kind in rows)])
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr("eval_bundle/core.yaml", json.dumps({"icl_tasks": tasks}))  # JSON is YAML
        bundle.writestr("eval_bundle/eval_meta_data.csv", table.getvalue())
        for kind, examples in rows.items():
            lines = "".join(json.dumps(example) + "\n" for example in examples)
            bundle.writestr(f"eval_bundle/eval_data/{kind}.jsonl", lines)


def main():
    folder = Path(sys.argv[1])
    for i in range(4):
        write_table(
            folder, "karpathy/fineweb-edu-100b-shuffle", f"shard_{i:05d}", [{"text": text(200)} for _ in range(999)]
        )
    for split in ("train", "test", "validation"):
        name = f"{split}-00000-of-00001"
        write_table(
            folder, "HuggingFaceTB/smol-smoltalk", f"data/{name}", [{"messages": conversation()} for _ in range(200)]
        )
        write_table(folder, "openai/gsm8k", f"main/{name}", [gsm8k(i) for i in range(200)])
        write_table(folder, "cais/mmlu", f"all/{name}", [question(i) for i in range(200)])
        for level in ("Easy", "Challenge"):
            write_table(folder, "allenai/ai2_arc", f"ARC-{level}/{name}", [arc(i) for i in range(200)])
    for name in ("all/auxiliary_train", "all/dev"):
        write_table(folder, "cais/mmlu", f"{name}-00000-of-00001", [question(i) for i in range(200)])
    write_table(
        folder, "cais/mmlu", "auxiliary_train/train-00000-of-00001", [{"train": question(i)} for i in range(200)]
    )
    write_table(
        folder, "openai/openai_humaneval", "openai_humaneval/test-00000-of-00001", [humaneval(i) for i in range(20)]
    )
    bucket, words = folder / "karpathy-public", folder / "dwyl/english-words/refs/heads/master"
    bucket.mkdir(exist_ok=True)
    words.mkdir(parents=True, exist_ok=True)
    write_bundle(bucket / "eval_bundle.zip")
    (bucket / "identity_conversations.jsonl").write_text("".join(json.dumps(conversation()) + "\n" for _ in range(100)))
    letters = "abcdefghijklmnopqrstuvwxyz"
    (words / "words_alpha.txt").write_text("".join("".join(rng.choices(letters, k=6)) + "\n" for _ in range(2000)))


if __name__ == "__main__":
    main()
