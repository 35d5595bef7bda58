"""
HumanEval: Python functions to write from their docstrings (Chen et al. 2021).

https://huggingface.co/datasets/openai/openai_humaneval
"""

import re

from nanochat.execution import check_level, execute_many
from tasks.common import PublicTask, user_and_assistant


def reply_code(reply):
    """The code in the first fenced block (``` or ```python) of a reply; the whole reply if it has none."""
    block = re.search(r"```(?:python)?[ \t]*\n(.*?)```", reply, re.DOTALL)
    return block[1] if block else reply


def leading_imports(prompt):
    """The import lines at the top of a prompt. Replies often use List etc. without importing them again."""
    header = re.match(r"((import |from |#).*\n|[ \t]*\n)*", prompt)[0]
    return "\n".join(re.findall(r"^(?:import|from) .*", header, re.MULTILINE))


class HumanEval(PublicTask):
    """
    Runs replies together with the problem's tests in a sandbox of the given level (see execution.py).

    Raises UserError before anything runs if the machine's sandbox is below that level.
    """

    def __init__(self, level="strict", **kwargs):
        check_level(level)
        self.level = level
        super().__init__("openai/openai_humaneval", "openai_humaneval/test", **kwargs)

    def conversation(self, row):
        solution = row["prompt"] + row["canonical_solution"]
        return user_and_assistant(row["prompt"], solution, entry_point=row["entry_point"], test=row["test"])

    def program(self, conversation, assistant_response):
        """Source text: the prompt's imports, the reply's code, the problem's tests and the call that runs them."""
        imports = leading_imports(conversation["messages"][0]["content"])
        call = f"check({conversation['entry_point']})"
        return "\n\n".join([imports, reply_code(assistant_response), conversation["test"], call]) + "\n"

    def evaluate(self, conversation, assistant_response):
        return self.evaluate_many([(conversation, assistant_response)])[0]

    def evaluate_many(self, pairs):
        """Verdicts on pairs of conversation and reply. The programs run on all cores."""
        programs = [self.program(conversation, reply) for conversation, reply in pairs]
        return [result.success for result in execute_many(programs, level=self.level)]
