"""Prompts for judges: our own, or files in the formats of FastChat and alpaca_eval."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fusion.config import UserError, raise_problems
from fusion.evaluation.endpoint import Message

BUILT_IN = Path(__file__).parent / "prompts"
MT_BENCH_NAMES = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
PART = re.compile(r"<\|im_start\|>(\w+)\n(.*?)\n?<\|im_end\|>", re.DOTALL)


@dataclass(frozen=True)
class JudgePrompt:
    name: str
    messages: tuple[Message, ...]
    """Roles and templates with fields in braces."""

    def filled(self, **fields: str) -> tuple[Message, ...]:
        """The messages with every `{field}` replaced, once: what is filled in is never read as a template."""
        known = re.compile("{(" + "|".join(map(re.escape, fields)) + ")}")
        return tuple(
            {"role": one["role"], "content": known.sub(lambda found: fields[found.group(1)], one["content"])}
            for one in self.messages
        )


@dataclass(frozen=True)
class PromptFile:
    prompts: Mapping[str, JudgePrompt]
    origin: str
    """`built-in`, or the file's name."""
    digest: str
    """First 16 hex digits of the SHA-256 of the file."""

    @property
    def is_built_in(self) -> bool:
        return self.origin == "built-in"

    def to_json(self) -> dict[str, str]:
        return {"prompts": self.origin, "prompts_sha256": self.digest}


def mt_bench_prompts(path: str) -> PromptFile:
    """The four prompts for single answers, from a file in FastChat's format or our own.

    Raises UserError where the file or one of the four is missing, or has no template.
    """
    text, origin = _read(path, "mt_bench.jsonl", "mt_bench.prompts")
    prompts, problems = {}, []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, system, template = str(row["name"]), str(row["system_prompt"]), str(row["prompt_template"])
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{path}, line {number}: not a prompt of FastChat's format ({error!r})")
            continue
        prompts[name] = JudgePrompt(
            name, ({"role": "system", "content": system}, {"role": "user", "content": template})
        )
    problems += [f"{path}: the prompt {name} is missing" for name in MT_BENCH_NAMES if name not in prompts]
    raise_problems(problems)
    return PromptFile(prompts, origin, _digest(text))


def alpaca_eval_prompt(path: str) -> PromptFile:
    """The prompt for two answers, from a text in alpaca_eval's format (ChatML parts, or one text for the user)."""
    text, origin = _read(path, "alpaca_eval.txt", "alpaca_eval.prompts")
    parts = PART.findall(text) or [("user", text)]
    missing = [name for name in ("instruction", "output_1", "output_2") if f"{{{name}}}" not in text]
    raise_problems([f"{path}: the prompt has no place for {{{name}}}" for name in missing])
    messages = tuple({"role": role, "content": content} for role, content in parts)
    return PromptFile({"pair": JudgePrompt("pair", messages)}, origin, _digest(text))


def _read(path: str, built_in: str, setting: str) -> tuple[str, str]:
    file = Path(path) if path else BUILT_IN / built_in
    try:
        return file.read_text("utf-8"), file.name if path else "built-in"
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{setting}={path}: the prompts cannot be read: {error}") from error


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8")).hexdigest()[:16]
