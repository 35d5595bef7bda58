"""
Reinforcement learning on a task with right answers, from the model's own attempts.

    python -m scripts.chat_rl                                                # the pocket world: three minutes
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl               # GSM8K

Reads an sft checkpoint and the tokenizer. Writes chatrl_checkpoints/<the same tag>/.
"""

import time
from random import Random

from nanochat.cli import boolean, make_parser, parse_args, run_script
from nanochat.common import UserError, compute_init, print0


def build_parser():
    p = make_parser("scripts.chat_rl", __doc__)
    p.add_argument("--run", default="dummy", help='wandb run name; "dummy" logs nowhere')
    p.add_argument("--task", default="", help="what to practise, also mine.py:Mine; empty = GSM8K, or PocketHardSums")
    p.add_argument(
        "--source", default="sft", choices=("sft", "mid", "rl"), help="stage of the checkpoint to start from"
    )
    p.add_argument("--model_tag", default=None, help="folder name of that checkpoint; default: the deepest")
    p.add_argument("--step", type=int, default=None, help="step of that checkpoint; default: the newest")
    p.add_argument("--device_type", default="", help="cuda, mps or cpu; empty = the best one here")
    p.add_argument(
        "--dtype", default="", help="float32 or bfloat16; empty = bfloat16 where the hardware is built for it"
    )
    p.add_argument("--device_batch_size", type=int, default=8, help="rollouts per forward pass of training and device")
    p.add_argument("--examples_per_step", type=int, default=16, help="problems per step, over all devices")
    p.add_argument("--num_samples", type=int, default=16, help="answers per problem")
    p.add_argument("--max_new_tokens", type=int, default=256, help="longest answer")
    p.add_argument("--temperature", type=float, default=1.0, help="only 1: the loss scores what is sampled from")
    p.add_argument("--top_k", type=int, default=0, help="only 0 (off), for the same reason")
    p.add_argument("--max_rows", type=int, default=256, help="answers written at once, per device")
    p.add_argument("--num_epochs", type=int, default=1, help="passes over the task's problems")
    p.add_argument("--num_iterations", type=int, default=-1, help="optimizer steps; -1 = from --num_epochs")
    p.add_argument("--embedding_lr", type=float, default=0.2, help="AdamW, embedding")
    p.add_argument("--unembedding_lr", type=float, default=0.004, help="AdamW, head")
    p.add_argument("--matrix_lr", type=float, default=0.02, help="Muon, the blocks' matrices")
    p.add_argument("--weight_decay", type=float, default=0.0, help="AdamW, embedding and head")
    p.add_argument(
        "--init_lr_frac",
        type=float,
        help="all rates start at this multiple and fall to 0; default 0.05, or 0.15 in the pocket world",
    )
    p.add_argument("--seed", type=int, default=42, help="of the order of the problems and of the sampling")
    p.add_argument(
        "--resume", type=boolean, nargs="?", const=True, default=False, help="from the newest good checkpoint"
    )
    p.add_argument("--resume_from_step", type=int, default=-1, help="from this checkpoint; -1 = start anew")
    p.add_argument("--eval_every", type=int, default=60, help="steps between evaluations; -1 = never")
    p.add_argument("--eval_examples", type=int, default=400, help="held-out problems per evaluation")
    p.add_argument("--eval_samples", type=int, default=8, help="answers per held-out problem")
    p.add_argument("--save_every", type=int, default=60, help="steps between checkpoints; -1 = only at the end")
    p.add_argument("--keep", type=int, default=0, help="keep the newest checkpoints only; 0 = all")
    return p


def check_flags(args):
    """Raises UserError for numbers out of range, and for sampling from another distribution than the loss scores."""
    positive = ("device_batch_size", "examples_per_step", "max_new_tokens", "max_rows", "eval_examples", "eval_samples")
    for name in positive:
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)}: expected at least 1")
    if args.num_samples < 2:
        raise UserError(f"--num_samples={args.num_samples}: a group needs at least 2 answers to tell better from worse")
    if args.temperature != 1 or args.top_k:
        raise UserError(
            "--temperature other than 1 and --top_k would sample from another distribution than the loss scores; "
            "leave them out"
        )


def practice(name, corpus):
    """(name, training problems, held-out problems); raises UserError for a task that cannot be practised."""
    from tasks.mixtures import EVAL_TASKS, find_task

    name = name or {"public": "GSM8K", "pocket": "PocketHardSums"}[corpus]
    task = find_task(name)
    if not task.train:
        choices = ", ".join(name for name, task in EVAL_TASKS.items() if task.train)
        raise UserError(f"--task={name}: choose one of {choices}, or your own as file.py:Class")
    train_task, eval_task = task.train(corpus=corpus), task.make(corpus=corpus)
    if train_task.eval_type != "generative":
        raise UserError(
            f"--task={name} is answered by a letter's logit; practice needs one that is answered in writing"
        )
    return name, train_task, eval_task


def problems_of_step(step, per_step, size, seed):
    """{index: seed of its sampling} of a step's problems: every epoch goes through all `size` in its own order."""
    places = [divmod(i, size) for i in range(step * per_step, (step + 1) * per_step)]
    orders = {epoch: Random(f"{seed} {epoch}").sample(range(size), size) for epoch in {epoch for epoch, _ in places}}
    indices = [orders[epoch][at] for epoch, at in places]
    return {i: Random(f"{seed} {step} {i}").getrandbits(31) for i in indices}


def main(argv=None):
    args = parse_args(build_parser(), argv)
    check_flags(args)
    started = time.time()
    from nanochat.chat_eval import evaluate_task
    from nanochat.checkpoint_manager import checkpoint_dir, load_model, update_meta
    from nanochat.report import get_report
    from nanochat.rl import make_sampler, mean_over_ranks, policy_batches, roll_out, sync
    from nanochat.schedule import lr_multiplier, set_schedule
    from nanochat.tracking import RunLog
    from nanochat.train import Run, due, train_step

    # Machine, tokenizer, model and task
    compute = compute_init(args.device_type, args.dtype, args.seed)
    model, tokenizer, source_meta = load_model(args.source, compute, args.model_tag, args.step, inference=False)
    corpus = source_meta["corpus"]
    if args.init_lr_frac is None:
        args.init_lr_frac = {"public": 0.05, "pocket": 0.15}[corpus]
    args.task, train_task, eval_task = practice(args.task, corpus)
    num_steps = args.num_iterations
    if num_steps <= 0:
        num_steps = args.num_epochs * len(train_task) // args.examples_per_step
    if num_steps < 1:
        raise UserError(f"nothing to train: {len(train_task)} problems, {args.examples_per_step} per step")
    training = Run(checkpoint_dir("rl", source_meta["model_tag"]), args, compute, model.config, num_steps)
    if training.finished:
        return

    # Optimizers, and where an earlier run left them
    rates = (args.unembedding_lr, args.embedding_lr, args.matrix_lr)
    optimizers = model.setup_optimizers(*rates, args.weight_decay, compute.dtype)
    meta = training.restore(model, optimizers)
    sampler = make_sampler(model, tokenizer, compute)
    print0(f"{args.task}: {len(train_task):,} problems, {num_steps:,} steps of {args.examples_per_step}")
    log = RunLog("rl", "nanochat-rl", args, compute, num_steps, model.estimate_flops(), meta.get("log_state"))
    results = meta.get("results", {})

    def evaluate(step):
        settings = dict(max_problems=args.eval_examples, max_new_tokens=args.max_new_tokens, max_rows=args.max_rows)
        greedy = evaluate_task(eval_task, sampler, **settings)
        sampled = evaluate_task(
            eval_task, sampler, num_samples=args.eval_samples, temperature=1.0, top_k=0, seed=args.seed, **settings
        )
        found = {"greedy": greedy.accuracy, "pass@1": sampled.accuracy}
        found[f"pass@{args.eval_samples}"] = sampled.pass_at(args.eval_samples)
        log.metrics(step, **found)
        print0(f"step {step:05d} | held out:", ", ".join(f"{name} {value:.2%}" for name, value in found.items()))
        answer = greedy.records[step % len(greedy.records)]
        print0(f"  {answer['messages'][0]['content']!r} -> {answer['answers'][0]!r} ({answer['verdicts'][0]})")
        results.setdefault("first", found)
        results["last"] = found

    # Loop: one more turn than there are steps, to save and judge what was trained
    for step in range(training.first_step, num_steps + 1):
        last = step == num_steps
        sync(sampler, model)
        if step > training.first_step and (last or due(step, args.save_every) or training.stopping):
            state = {"corpus": corpus, "results": results, "log_state": log.state()}
            path = training.save(step, model, [] if last else optimizers, state, {}, finished=last)
            if training.stopping:
                training.exit(log)
        if due(step, args.eval_every, last):
            evaluate(step)
        if last:
            break
        compute.synchronize()
        t0 = time.perf_counter()
        problems = list(problems_of_step(step, args.examples_per_step, len(train_task), args.seed).items())
        mine = dict(problems[compute.rank :: compute.world_size])
        groups = roll_out(sampler, train_task, mine, args.num_samples, args.max_new_tokens, args.max_rows).values()
        batches, left_out = policy_batches(groups, args.device_batch_size, compute.device)
        lr_mult = args.init_lr_frac * lr_multiplier(step / num_steps, warmdown_ratio=1.0)
        set_schedule(optimizers, lr_mult)
        result = train_step(model, optimizers, batches, compute, stop=training.stop_requested, left_out=left_out)
        rollouts = [rollout for group in groups for rollout in group]
        reward = mean_over_ranks([r.reward for r in rollouts], compute)
        cut_off = mean_over_ranks([r.cut_off for r in rollouts], compute)
        compute.synchronize()
        training.stopping = result.stop
        results["reward"] = reward
        seconds = time.perf_counter() - t0
        log.step(step, result, result.tokens, seconds, lr_mult, reward=reward, cut_off=cut_off)
    log.close()
    update_meta(path, compute, results=results)

    # Report
    outcome = {
        "Problems": len(train_task),
        "Number of iterations": num_steps,
        "Reward of the last step": results.get("reward"),
    }
    for when in ("first", "last"):
        outcome |= {f"{when} {name}": value for name, value in results.get(when, {}).items()}
    outcome["wall_clock_seconds"] = time.time() - started
    get_report().log(section="Chat RL", data=[vars(args), outcome])


if __name__ == "__main__":
    run_script(main)
