"""
Generate conversations that teach a model its persona, from templates or with another model.

    python -m dev.gen_synthetic_data                                        # -> identity_conversations.jsonl
    python dev/gen_synthetic_data.py --persona=me.json > my_identity.jsonl
    OPENAI_API_KEY=... python -m dev.gen_synthetic_data --endpoint=https://api.example.com/v1 --model=some-model

The persona is a JSON object with "name", "maker", "about", "traits" (a list) and "facts" (a list of {"ask": [...],
"tell": [...]}, with questions and their answers). In questions and answers, [a|b] is a random choice. Each line of the
output is a JSON array of messages, the format of tasks/customjson.py. Templates need no network.
"""

import io
import json
import os
import re
import stat
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

from nanochat.cli import make_parser, parse_args, path, run_script
from nanochat.common import UserError, base_dir, write_text
from nanochat.pocket.problems import careless, informal
from nanochat.pocket.talk import section_exchange
from nanochat.pocket.world import fill, load_world
from nanochat.tokenizer import check_conversation

# Topics for every persona, in the format of its "facts". Slots such as {name} are filled with the persona's fields.
# `sections` of pocket_talk.txt have more wordings of their questions: a model understands only what varies enough.
TOPICS = [
    {
        "ask": [
            "[Who are you|What is your name|What are you called|What should I call you|Who is this]?",
            "[Please introduce yourself|Tell me about yourself|Say a bit about yourself].",
            "Who am I [talking|speaking|chatting] to?",
            "[Are you ChatGPT|Are you Claude|Are you Gemini|Is this GPT-4]?",
        ],
        "sections": ["self name", "self name", "self name", "self chatgpt"],
        "tell": ["I am {name}, {about}.", "My name is {name}. I am {about}.", "This is {name}, {about}."],
    },
    {
        "ask": ["Who [made|built|trained|created] you?", "Where do you come from?", "Who is your [maker|creator]?"],
        "sections": ["self maker"],
        "tell": ["I was made by {maker}.", "{Maker} made me.", "I am {name}, and I was made by {maker}."],
    },
    {
        "ask": ["What are you like?", "How would you describe yourself?", "What is your character?"],
        "tell": ["I try to be {trait}.", "I am {name}, and I try to be {trait}."],
    },
    {
        "ask": ["What are you[| exactly]?", "Are you [human|a person|alive]?"],
        "sections": ["self what", "self human"],
        "tell": ["I am {name}: {about}.", "No person, only a program: I am {name}, {about}."],
    },
]
OPENERS = ["[Hi|Hello|Hey|Good morning|Good evening|hi|hello|hey there|Greetings|Yo|Hola|Bonjour|Hallo|Ciao][|!|.]"]
GREETING = {"ask": OPENERS, "sections": ["talk hello", "talk hello name"]}
GREETING["tell"] = [
    "[Hi|Hello|Hey]! I am {name}. [How can I help you?|What would you like to know?|What is on your mind?]"
]
THANKS = {"ask": ["[Thanks|Thank you|thanks a lot|Great, thanks|Interesting, thank you|Cool|Good to know][|!|.]"]}
THANKS["tell"] = ["You are welcome!", "Any time!", "You are welcome. [Ask me more if you like.|Have a good day!]"]

REQUEST = """Write one short, natural conversation between a user and a chat model, in which the user gets to know the \
model. The model is described by this JSON:

{persona}

The model's answers must agree with the description, be plain text without markup, and be short. Some users are brief, \
some are curious, some write in another language (then the model answers that English is its best language). The user \
may begin like one of these: {openers}.

Answer with nothing but a JSON array of 2 to 8 messages that take turns, user first: \
[{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]"""


def load_persona(path):
    """The persona in a JSON file. Raises UserError if the file is missing or a field is invalid."""
    try:
        persona = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no persona file at {path}; start from a copy of dev/persona.json") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: not JSON ({e.msg})") from None
    missing = {"name", "maker", "about", "traits", "facts"} - set(persona)
    if missing or not persona["traits"] or not all(fact.get("ask") and fact.get("tell") for fact in persona["facts"]):
        raise UserError(
            f"{path}: expected name, maker, about, traits (not empty) and facts, each with ask and tell"
            + (f"; missing: {', '.join(sorted(missing))}" if missing else "")
        )
    return persona


def by_template(persona, rng):
    """Messages of a random conversation from templates: one to three topics, sometimes with greeting and thanks."""
    slots = {key: persona[key] for key in ("name", "maker", "about")}
    slots |= {"trait": rng.choice(persona["traits"]), "Maker": persona["maker"][:1].upper() + persona["maker"][1:]}
    topics = TOPICS * 2 + TOPICS[:1] + persona["facts"]
    topics = rng.sample(topics, min(len(topics), rng.randint(1, 3)))
    if rng.random() < 0.4:
        topics.insert(0, GREETING)
    if rng.random() < 0.3:
        topics.append(THANKS)
    messages = []
    for topic in topics:
        messages.append({"role": "user", "content": question(rng, topic)})
        messages.append({"role": "assistant", "content": fill(rng, rng.choice(topic["tell"]), **slots)})
    return messages


def question(rng, topic):
    """A question on a topic: from its templates, or in three of four cases from its sections."""
    while "sections" in topic and rng.random() < 0.75:
        for text, _ in section_exchange(rng, "train", load_world(), rng.choice(topic["sections"])):
            if "nanochat" not in text.lower():
                return text
    return careless(rng, informal(rng, fill(rng, rng.choice(topic["ask"]))))


def by_model(persona, rng, args):
    """Messages of one conversation written by the model behind an OpenAI-compatible endpoint."""
    openers = [fill(rng, rng.choice(rng.choice([OPENERS, *(t["ask"] for t in TOPICS)]))) for _ in range(5)]
    prompt = REQUEST.format(persona=json.dumps(persona, ensure_ascii=False), openers=json.dumps(openers))
    body = {"model": args.model, "messages": [{"role": "user", "content": prompt}], "temperature": args.temperature}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):  # a local server needs none
        headers["Authorization"] = f"Bearer {key}"
    url = args.endpoint.rstrip("/") + "/chat/completions"
    for _ in range(args.attempts):
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                reply = json.load(response)["choices"][0]["message"]["content"]
            system, messages = check_conversation({"messages": json.loads(re.search(r"\[.*\]", reply, re.S)[0])})
            if not system and messages[-1]["role"] == "assistant":
                return messages
            error = "expected messages of user and assistant in turns, the last one from the assistant"
        except urllib.error.HTTPError as e:
            error = f"{e.code} {e.reason}"
            if e.code in (400, 401, 403, 404):
                break
        except (OSError, ValueError, KeyError, TypeError, IndexError) as e:  # no connection, or an invalid reply
            error = e
    raise UserError(f"{url}: no usable conversation from {args.model} ({error})")


def build_parser():
    p = make_parser("dev.gen_synthetic_data", __doc__)
    default = Path(__file__).with_name("persona.json")
    p.add_argument("--persona", default=default, type=path, help="JSON file (default: dev/persona.json)")
    p.add_argument("-n", "--num", type=int, default=2000, help="number of conversations")
    out_help = "file, - = stdout; default: stdout if that is a file, else the base directory"
    p.add_argument("-o", "--out", type=path, default="", help=out_help)
    p.add_argument("--seed", type=int, default=42, help="random seed")
    p.add_argument("--endpoint", default="", help="base URL of an OpenAI-compatible API; empty = use the templates")
    p.add_argument("--model", default="", help="name of the model at the endpoint; OPENAI_API_KEY holds the key")
    p.add_argument("-w", "--num_workers", type=int, default=4, help="number of concurrent requests")
    p.add_argument("--temperature", type=float, default=1.0, help="sampling temperature at the endpoint")
    p.add_argument("--attempts", type=int, default=3, help="attempts per conversation at the endpoint")
    return p


def main(argv=None):
    args = parse_args(build_parser(), argv)
    if args.endpoint and not args.model:
        raise UserError("--endpoint needs --model, the name of the model at the endpoint")
    persona = load_persona(args.persona)
    rngs = [Random(f"identity {args.seed} {i}") for i in range(args.num)]
    if args.endpoint:
        with ThreadPoolExecutor(args.num_workers) as pool:
            conversations = list(pool.map(lambda rng: by_model(persona, rng, args), rngs))
    else:
        conversations = [by_template(persona, rng) for rng in rngs]
    text = "".join(json.dumps(messages, ensure_ascii=False) + "\n" for messages in conversations)
    out = args.out or ("-" if is_redirected() else base_dir() / "identity_conversations.jsonl")
    if out == "-":
        sys.stdout.reconfigure(encoding="utf-8")
        sys.stdout.write(text)
    else:
        write_text(out, text)
    place = "standard output; --out=FILE writes a file" if out == "-" else out
    print(f"{len(conversations):,} conversations of {persona['name']} -> {place}", file=sys.stderr)


def is_redirected():
    """Whether standard output is a file: `> own.jsonl`. In a notebook or a container it may be a pipe."""
    try:
        return stat.S_ISREG(os.fstat(sys.stdout.fileno()).st_mode)
    except io.UnsupportedOperation:
        return False


if __name__ == "__main__":
    run_script(main)
