"""
Reinforcement learning (REINFORCE) on a task whose answers can be verified.

    python -m scripts.chat_rl                                                # pocket corpus: three minutes
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl               # GSM8K

Reads an sft checkpoint and the tokenizer. Writes chatrl_checkpoints/<tag of that model>/.
"""

from random import Random

from nanochat.cli import add_run_flags, make_parser, non_negative, parse_args, run_script
from nanochat.cluster import compute_init
from nanochat.common import print0, require, task_errors


def build_parser():
    parser = make_parser("scripts.chat_rl", __doc__)
    add_run_flags(parser, device_batch_size=8, save_every=60)
    add = parser.add_argument
    add("--task", default="", help="task to train on, or file.py:Class; empty = GSM8K (pocket corpus: PocketHardSums)")
    add("--source", default="sft", choices=("sft", "mid", "rl"), help="stage of the checkpoint to start from")
    add("--model_tag", help="folder name of that checkpoint (default: the deepest)")
    add("--step", type=int, help="step of that checkpoint (default: the newest)")
    add("--examples_per_step", type=int, default=16, help="problems per step, over all devices")
    add("--num_samples", type=int, default=16, help="answers per problem")
    add("--max_new_tokens", type=int, default=256, help="maximum length of an answer in tokens")
    add("--temperature", type=float, default=1.0, help="must be 1: other values bias the policy gradient")
    add("--top_k", type=int, default=0, help="must be 0 (off), for the same reason")
    add("--max_rows", type=int, default=256, help="answers generated at once, per device")
    add("--num_epochs", type=int, default=1, help="passes over the task's problems")
    add("--num_iterations", type=int, default=-1, help="optimizer steps; -1 = from --num_epochs")
    add("--init_lr_frac", type=non_negative, default=0.05, help="initial learning rates, as a multiple of the flags")
    add("--eval_every", type=int, default=60, help="steps between evaluations; -1 = never")
    add("--eval_examples", type=int, default=400, help="held-out problems per evaluation")
    add("--eval_samples", type=int, default=8, help="answers per held-out problem")
    return parser


def load_task(name, corpus):
    """(name, training problems, held-out problems). Raises UserError for a task that RL cannot train on."""
    from tasks.mixtures import EVAL_TASKS, find_task

    name = name or {"public": "GSM8K", "pocket": "PocketHardSums"}[corpus]
    task = find_task(name)
    choices = ", ".join(name for name, task in EVAL_TASKS.items() if task.trainable)
    require(task.trainable, f"--task={name}: choose one of {choices}, or your own as file.py:Class")
    train_task, eval_task = task.make("train", corpus=corpus), task.make(corpus=corpus)
    require(train_task.eval_type == "generative", f"--task={name} is multiple choice; RL needs generated answers")
    with task_errors(name):
        require(len(train_task), "no problems to train on")
        if train_task.fingerprint() == eval_task.fingerprint():
            print0(f"warning: {name} has the same problems for training and evaluation; give it a parameter `split`")
    return name, train_task, eval_task


def problems_of_step(step, per_step, size, seed):
    """{problem index: sampling seed} of one step. Every epoch is a seeded permutation of all `size` problems."""
    positions = [divmod(i, size) for i in range(step * per_step, (step + 1) * per_step)]
    orders = {epoch: Random(f"{seed} {epoch}").sample(range(size), size) for epoch in {epoch for epoch, _ in positions}}
    indices = [orders[epoch][i] for epoch, i in positions]
    return {i: Random(f"{seed} {step} {i}").getrandbits(31) for i in indices}


def main(argv=None):
    args = parse_args(build_parser(), argv)
    for name in "device_batch_size examples_per_step max_new_tokens max_rows eval_examples eval_samples".split():
        require(getattr(args, name) >= 1, f"--{name}={getattr(args, name)}: expected at least 1")
    require(args.num_samples >= 2, f"--num_samples={args.num_samples}: need at least 2 answers, to compare rewards")
    distribution = "--temperature other than 1 and --top_k would sample from another distribution than the loss assumes"
    require(args.temperature == 1 and not args.top_k, f"{distribution}; leave them out")
    from nanochat import chat_eval, rl, schedule, tracking, train
    from nanochat.checkpoint_manager import load_model, made_from

    # Machine, tokenizer, model and task
    compute = compute_init(args.device_type, args.dtype, args.seed, args.dist_timeout)
    model, tokenizer, source_meta = load_model(args.source, compute, "train", args.model_tag, args.step)
    corpus = source_meta["corpus"]
    args.task, train_task, eval_task = load_task(args.task, corpus)
    num_steps = train.epoch_steps(args, train_task, args.examples_per_step)
    origins = made_from(source_meta, tokenizer, train_task)
    stage = train.Stage("rl", source_meta["model_tag"], args, compute, model.config, num_steps, origins)
    if stage.finished:
        return

    # Optimizers; restores weights and optimizer state when resuming
    optimizers = stage.setup_optimizers(model)
    max_tokens = args.device_batch_size * model.config.sequence_len  # of a micro-batch
    model = stage.compile(model, num_steps * args.examples_per_step * args.num_samples * train.TOKENS_PER_CONVERSATION)
    sampler = rl.make_sampler(model, tokenizer, compute)
    print0(f"{args.task}: {len(train_task):,} problems, {num_steps:,} steps of {args.examples_per_step}")
    log = tracking.StageLog("rl", args, compute, num_steps, model, stage.meta.get("log_state"))
    results = stage.meta.get("results", {})

    def evaluate(step):
        """Log held-out accuracy with greedy decoding, and pass@1 and pass@k with sampling."""
        settings = dict(max_problems=args.eval_examples, max_new_tokens=args.max_new_tokens, max_rows=args.max_rows)
        greedy = chat_eval.evaluate_task(eval_task, sampler, **settings)
        settings |= dict(num_samples=args.eval_samples, temperature=1.0, top_k=0, seed=args.seed)
        sampled = chat_eval.evaluate_task(eval_task, sampler, **settings)
        scores = {"greedy": greedy.accuracy} | {f"pass@{k}": sampled.pass_at(k) for k in (1, args.eval_samples)}
        text = ", ".join(f"{name} {value:.2%}" for name, value in scores.items())
        log.evaluation(step, f"held out: {text}", **scores)
        example = greedy.records[step % len(greedy.records)]
        log.samples(step, {example["messages"][0]["content"]: f"{example['answers'][0]} ({example['verdicts'][0]})"})
        results.setdefault("first", scores)
        results["last"] = scores

    # Loop: num_steps + 1 iterations; the last one only saves and evaluates
    for step in range(stage.first_step, num_steps + 1):
        last = step == num_steps
        rl.sync(sampler, model)
        stage.checkpoint(step, last, model, [] if last else optimizers, None, log, corpus=corpus, results=results)
        if train.due(step, args.eval_every, last):
            evaluate(step)
        if last:
            break
        log.start_step()
        problems = list(problems_of_step(step, args.examples_per_step, len(train_task), args.seed).items())
        own = dict(problems[compute.rank :: compute.world_size])
        groups = rl.roll_out(sampler, train_task, own, args.num_samples, args.max_new_tokens, args.max_rows).values()
        batches, skipped_tokens = rl.policy_batches(groups, max_tokens, compute.device)
        lr_mult = args.init_lr_frac * schedule.lr_multiplier(step / num_steps, warmdown_ratio=1.0)
        schedule.set_schedule(optimizers, lr_mult)
        result = stage.train_step(model, optimizers, batches, skipped_tokens=skipped_tokens)
        results["reward"], cut_off = rl.mean_over_ranks(groups, compute)
        log.end_step(step, result, result.tokens, lr_mult, reward=results["reward"], cut_off=cut_off)
    stage.close(None, log, results=results)

    # Report
    scores = {f"{when} {name}": x for when in ("first", "last") for name, x in results.get(when, {}).items()}
    facts = {"Problems": len(train_task), "Number of iterations": num_steps}
    facts |= {"Reward of the last step": results.get("reward"), **scores}
    log.report("Chat RL", args, facts)


if __name__ == "__main__":
    run_script(main)
