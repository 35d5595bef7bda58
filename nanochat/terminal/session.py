"""A conversation with a model: builds the prompts and keeps the answers."""

import time
from collections import namedtuple

from nanochat.common import UserError, well_formed
from nanochat.engine import Request
from nanochat.inference.answer import Answer

Turn = namedtuple("Turn", "question row answer")  # row: the scheduler's Row, which has the answer's tokens


class Chat:
    """
    A conversation.

    The prompt of a chat model contains the newest turns that fit into the context; of a base model, only the question.
    """

    def __init__(self, engine, source, max_tokens, system="", **sampling):
        self.engine, self.is_base, self.max_tokens = engine, source == "base", max_tokens
        # usage: token counts and times of the last answer, see ask()
        self.sampling, self.n_questions, self.usage = sampling, 0, {}
        self.reset(system)

    def reset(self, system):
        """Start a new conversation. The system text comes before the first question of every prompt."""
        if system and self.is_base:
            raise UserError("a base model continues plain text and takes no system text; choose another stage with -i")
        self.system, self.turns = well_formed(system), []

    def ask(self, question):
        """
        Yield the answer as pieces of text while it is generated: (part type, text), see Detokenizer.

        If the caller stops early, the conversation keeps the partial answer. Raises UserError if the question is too
        long for the context.
        """
        question = well_formed(question)  # a terminal with another encoding can send lone surrogates
        seed = self.sampling["seed"] + self.n_questions  # a repeated question gets a new answer
        request = Request(self._prompt(question), self.max_tokens, **self.sampling | {"seed": seed})
        loop = self.engine.decode_loop(max_rows=1)
        (row,), answer = loop.submit(request), Answer(self.engine.tokenizer)
        self.turns.append(Turn(question, row, answer))
        self.n_questions += 1
        start, first_token_seconds = time.perf_counter(), None
        while not row.finish:
            loop.step()
            first_token_seconds = first_token_seconds or time.perf_counter() - start
            answer.push(row.tokens[-1], finish=row.finish)
            yield answer.pieces[-1]
        seconds, n_tokens = time.perf_counter() - start, len(row.completion)
        self.usage = {"prompt_tokens": len(request.tokens), "completion_tokens": n_tokens}
        self.usage |= {"seconds": round(seconds, 3), "first_token_seconds": round(first_token_seconds, 3)}
        self.usage |= {"tokens_per_second": round(n_tokens / seconds, 1), "finish_reason": row.finish}

    def _prompt(self, question):
        """Tokens of the newest turns that fit into the context, followed by `question`."""
        tokenizer, context = self.engine.tokenizer, self.engine.model.config.sequence_len
        if self.is_base:
            return [tokenizer.get_bos_token_id(), *tokenizer.encode(question)]

        def render(question, system=""):
            messages = [{"role": "system", "content": system}] if system else []
            return tokenizer.render_for_completion({"messages": [*messages, {"role": "user", "content": question}]})

        prompt, suffix = render(question, self.system), render(question)[1:]  # a suffix has no <|bos|>
        if len(prompt) >= context:
            subject = "message and system text have" if self.system else "the message has"
            raise UserError(f"{subject} {len(prompt) - 1:,} tokens; the model's context holds {context:,}: shorten it")
        for turn in reversed(self.turns):
            suffix = [*turn.row.completion, self.engine.assistant_end, *suffix]
            longer = render(turn.question, self.system) + suffix
            if len(longer) + min(self.max_tokens, context // 2) > context:  # no room for the answer
                break
            prompt, suffix = longer, render(turn.question)[1:] + suffix
        return prompt

    def messages(self):
        """The conversation as a list of messages, as tokenizer and tasks expect it."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for question, _, answer in self.turns:
            content = answer.text if all(part["type"] == "text" for part in answer.parts) else answer.parts
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": content}]
        return messages

    def report(self):
        """The last answer as a dict: text, tool_steps, token counts, times and finish_reason."""
        answer = self.turns[-1].answer
        steps = [{key: step[key] for key in ("type", "expression", "result")} for step in answer.steps]
        return {"text": answer.text, "tool_steps": steps, **self.usage}
