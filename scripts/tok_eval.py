"""
Compare the tokenizer's compression with those of GPT-2 and GPT-4, where tiktoken has them cached.

    python -m scripts.tok_eval

Reads tokenizer/ and base_data/. Writes the report's section "Tokenizer evaluation".
"""

from unittest import mock

from nanochat.cli import make_parser, parse_args, run_script
from nanochat.common import UserError, print0

BASELINES = {"gpt2": "GPT-2", "cl100k_base": "GPT-4"}

NEWS = """
HARLOW BAY, 3 March - The harbour council voted 7-2 on Tuesday evening to keep the town's old lighthouse lit for at
least another ten years, ending a dispute that had divided fishermen and hotel owners since last autumn. "It costs us
less than a new bus stop," said Councillor Miriam Okafor, who had asked for the vote, "and nobody has ever sailed home
by the light of a bus stop." Repairs worth $1.4 million are to begin in May; the lamp itself, built in 1887, will be
replaced by one that uses a fifth of the electricity. Opponents said they weren't convinced and would appeal.
"""

KOREAN = """
우리 동네 뒷산에는 오래된 소나무 한 그루가 있다. 할머니는 어릴 적에 그 나무 아래에서 친구들과 숨바꼭질을 했다고 하신다.
지난 토요일 아침에 나는 동생과 함께 산길을 올라갔다. 바람이 차가웠지만 하늘은 맑았고, 멀리 강이 은빛으로 반짝였다.
나무 옆 의자에 앉아 따뜻한 보리차를 마시면서 우리는 2050년의 마을이 어떤 모습일지 이야기했다. "그때도 이 나무는 있을까?"
"""

CODE = '''
class RunningMean:
    """Mean of the last `size` numbers."""

    def __init__(self, size: int = 100) -> None:
        self.size, self.total = size, 0.0
        self.window: list[float] = []

    def add(self, x: float) -> float:
        self.window.append(x)
        self.total += x
        if len(self.window) > self.size:  # the oldest one leaves
            self.total -= self.window.pop(0)
        return self.total / len(self.window)


if __name__ == "__main__":
    mean = RunningMean(size=3)
    print([round(mean.add(x), 2) for x in (1, 2, 3, 4.5, -7e-3)])  # [1.0, 1.5, 2.0, 3.17, 2.5]
'''

MATHS = r"""
\begin{theorem}\label{thm:sum}
For every integer $n \ge 1$ we have $\sum_{k=1}^{n} k^2 = \frac{n(n+1)(2n+1)}{6}$.
\end{theorem}
\begin{proof}
By induction on $n$. For $n = 1$ both sides equal $1$. If the claim holds for $n$, then
\begin{align*}
  \sum_{k=1}^{n+1} k^2 &= \frac{n(n+1)(2n+1)}{6} + (n+1)^2 = \frac{(n+1)\left(2n^2 + 7n + 6\right)}{6} \\
                       &= \frac{(n+1)(n+2)(2n+3)}{6}. \qedhere
\end{align*}
\end{proof}
Hence $\lim_{n \to \infty} n^{-3} \sum_{k \le n} k^2 = \int_0^1 x^2 \, \mathrm{d}x = \tfrac{1}{3}$.
"""

SCIENCE = """
When a leaf is lit, chlorophyll in the membranes of its chloroplasts absorbs mostly red and blue light and hands the
energy to electrons, which pass down a chain of proteins and pump hydrogen ions across the membrane. The ions flow back
through ATP synthase, a rotating enzyme that makes adenosine triphosphate from ADP and phosphate. The enzyme RuBisCO
then binds carbon dioxide to ribulose-1,5-bisphosphate; for each molecule of glucose, 6 CO2 and 12 H2O are used, and
6 O2 are released. Above about 35 °C photorespiration wastes a growing share of the energy gained.
"""


def build_parser():
    return make_parser("scripts.tok_eval", __doc__)


def load_cached(name):
    """tiktoken's tokenizer `name`, or None if tiktoken would have to download it: no run waits for a network here."""
    from nanochat.tokenizer import Tokenizer

    try:
        with mock.patch("tiktoken.load.read_file", side_effect=FileNotFoundError):
            return Tokenizer.from_pretrained(name)
    except FileNotFoundError:
        return None


def evaluation_texts():
    """name -> text: five short ones of different kinds, and the first row group of each split."""
    from nanochat.dataset import parquets_iter_batched

    texts = {"news": NEWS, "korean": KOREAN, "code": CODE, "math": MATHS, "science": SCIENCE}
    texts = {name: text.strip() for name, text in texts.items()}
    for split in ("train", "val"):
        try:
            texts[split] = "\n".join(next(iter(parquets_iter_batched(split))))
        except UserError as e:
            print0(f"the {split} split is left out: {e}")
    return {name: text for name, text in texts.items() if text}


def compression_table(texts, ours):
    """A markdown table: how many bytes a token holds."""
    lines = ["| Text | Bytes | Tokens | Bytes/token |", "|---|---|---|---|"]
    for name, text in texts.items():
        n_bytes, n = len(text.encode()), len(ours.encode(text))
        lines.append(f"| {name} | {n_bytes:,} | {n:,} | {n_bytes / n:.2f} |")
    return "\n".join(lines)


def comparison_table(texts, ours, baseline, label):
    """The same for both, and how many tokens ours saves (+) or costs (-)."""
    lines = [
        f"| Text | Bytes | {label} tokens | {label} bytes/token | Our tokens | Our bytes/token | Tokens saved |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, text in texts.items():
        n_bytes, theirs, n = len(text.encode()), len(baseline.encode(text)), len(ours.encode(text))
        saved = (theirs - n) / theirs
        lines.append(
            f"| {name} | {n_bytes:,} | {theirs:,} | {n_bytes / theirs:.2f} | {n:,} | {n_bytes / n:.2f} | {saved:+.1%} |"
        )
    return "\n".join(lines)


def main(argv=None):
    parse_args(build_parser(), argv)
    from nanochat.report import get_report
    from nanochat.tokenizer import get_tokenizer

    tokenizer = get_tokenizer()
    texts = evaluation_texts()
    for name, text in texts.items():
        assert tokenizer.decode(tokenizer.encode(text)) == text, name
    sections = [compression_table(texts, tokenizer)]
    for name, label in BASELINES.items():
        heading = f"### Comparison with {label} ({name})\n\n"
        baseline = load_cached(name)
        if baseline:
            sections.append(heading + comparison_table(texts, tokenizer, baseline, label))
        else:
            fetch = f"python -c \"import tiktoken; tiktoken.get_encoding('{name}')\""
            sections.append(f"{heading}Left out: tiktoken has not cached {name}; with a network, `{fetch}` caches it.")
    print0("\n\n".join(sections))
    get_report().log(section="Tokenizer evaluation", data=[f"Vocabulary: {tokenizer.get_vocab_size():,}", *sections])


if __name__ == "__main__":
    run_script(main)
