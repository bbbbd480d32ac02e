"""Chat messages to prompt text and back, in the format the released checkpoints were trained with.

The release ships no chat template: prompts are built by a program (``encoding_dsv4.py`` beside the weights). This
module gives the same text byte for byte. Tool calls use DSML, an XML-like notation whose tags carry a special token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
LATEST_REMINDER = "<｜latest_reminder｜>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
DSML = "｜DSML｜"
TASKS = {task: f"<｜{task}｜>" for task in ("action", "query", "authority", "domain", "title", "read_url")}

#: Every marker the encoding writes that a tokenizer should hold as one token.
SPECIAL_TOKENS = (BOS, EOS, USER, ASSISTANT, LATEST_REMINDER, THINK_OPEN, THINK_CLOSE, DSML, *TASKS.values())

_CALLS_OPEN = f"<{DSML}tool_calls>"
_CALLS_CLOSE = f"</{DSML}tool_calls>"
_INVOKE_CLOSE = f"</{DSML}invoke>"
_PARAMETER_CLOSE = f"</{DSML}parameter>"

_EFFORT_MAX = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)

_TOOLS_BEFORE_SCHEMAS = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"{_CALLS_OPEN}" block like the following:

{_CALLS_OPEN}
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{_PARAMETER_CLOSE}
...
{_INVOKE_CLOSE}
<{DSML}invoke name="$TOOL_NAME2">
...
{_INVOKE_CLOSE}
{_CALLS_CLOSE}

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK_OPEN}), you MUST output your complete reasoning inside \
{THINK_OPEN}...{THINK_CLOSE} BEFORE any tool calls or final response.

Otherwise, output directly after {THINK_CLOSE} with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_AFTER_SCHEMAS = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""


class EncodingError(ValueError, AssertionError):
    """Messages or a completion that the format does not allow.

    The release's own program reports most of these by assertions; being both lets callers written for it keep their
    ``except`` clauses.
    """


@dataclass
class _Turn:
    """One rendered turn: a message, or several tool results and user texts merged into one."""

    role: str
    message: Mapping[str, Any]
    # Of a user turn: each part's text and the id of the call it answers ("" for none); whether it is a tool's result.
    parts: list[tuple[str, str]] = field(default_factory=list)
    is_result: list[bool] = field(default_factory=list)

    @property
    def task(self) -> str | None:
        return self.message.get("task")

    @property
    def asks(self) -> bool:
        """Whether this turn can await an answer."""
        return self.role in ("user", "developer")


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    thinking_mode: str = "chat",
    context: Sequence[Mapping[str, Any]] | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    reasoning_effort: str | None = None,
) -> str:
    """The prompt text of a conversation.

    Args:
        messages: mappings with ``role`` (system, developer, user, assistant, tool, latest_reminder) and ``content``.
            Also understood: ``tools`` and ``response_format`` (system, developer), ``reasoning_content``,
            ``tool_calls`` (in the OpenAI form), ``wo_eos`` (assistant), ``tool_call_id`` (tool), ``task``.
        thinking_mode: ``"chat"`` (answers carry no reasoning) or ``"thinking"``.
        context: earlier messages, already encoded: they shape the result, but only ``messages`` are written, no BOS.
        drop_thinking: leave out the reasoning of answers before the last user turn, as training did. Conversations
            with tools keep it whatever is said here.
        add_default_bos_token: begin with BOS (when there is no context).
        reasoning_effort: ``"max"`` puts its instruction in front (thinking mode only); ``"high"`` and None change
            nothing.
    Returns: text to tokenize without adding further special tokens.
    Raises: EncodingError (a ValueError) naming the message that does not fit.
    Source: the encoding program in the released checkpoints.
    """
    _check_mode(thinking_mode)
    if reasoning_effort not in (None, "high", "max"):
        raise EncodingError(f"reasoning_effort must be None, 'high' or 'max', got {reasoning_effort!r}")
    earlier = _merge(context or ())
    new = _merge(messages)
    # The order of calls carries over from the context; a turn never merges into one that is already encoded.
    _order_results([*earlier, *new])
    turns = [*earlier, *new]
    keep_all = not drop_thinking or any(turn.message.get("tools") for turn in turns)
    if thinking_mode == "thinking" and not keep_all:
        turns = _drop_reasoning(turns)
        first = len(_drop_reasoning(earlier))
    else:
        first = len(earlier)

    text = [BOS] if add_default_bos_token and not earlier else []
    last_ask = _last_ask(turns)
    for index in range(first, len(turns)):
        if index == 0 and thinking_mode == "thinking" and reasoning_effort == "max":
            text.append(_EFFORT_MAX)
        text.append(_body(turns, index, thinking_mode, keep_all or index > last_ask))
        followed_by = turns[index + 1].role if index + 1 < len(turns) else "assistant"
        if followed_by in ("assistant", "latest_reminder"):
            reasons = thinking_mode == "thinking" and (keep_all or index >= last_ask)
            text.append(_cue(turns[index], thinking_mode, reasons))
    return "".join(text)


def _check_mode(thinking_mode: str) -> None:
    if thinking_mode not in ("chat", "thinking"):
        raise EncodingError(f"thinking_mode must be 'chat' or 'thinking', got {thinking_mode!r}")


def _merge(messages: Sequence[Mapping[str, Any]]) -> list[_Turn]:
    """One user turn from consecutive tool results and user texts; a text never joins a turn that carries a task."""
    turns: list[_Turn] = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise EncodingError(f"message {number}: expected a mapping with a 'role', got {message!r}")
        role = message["role"]
        if role not in ("system", "developer", "user", "assistant", "tool", "latest_reminder"):
            raise EncodingError(f"message {number}: unknown role {role!r}")
        if role == "developer" and not message.get("content"):
            raise EncodingError(f"message {number}: a developer message needs content")
        task = message.get("task")
        if task is not None and task not in TASKS:
            raise EncodingError(f"message {number}: unknown task {task!r}; known: {', '.join(TASKS)}")
        _check_form(number, message)
        if role not in ("user", "tool"):
            turns.append(_Turn(role, message))
            continue
        is_result = role == "tool"
        part = _content_text(message.get("content"))
        joins = bool(turns) and turns[-1].role == "user" and (is_result or turns[-1].task is None)
        if not joins:
            # Fields of a tool message describe the result, not the turn; of a user message only the task matters here.
            turns.append(_Turn("user", {} if is_result else {"task": task}))
        turn = turns[-1]
        turn.parts.append((part, str(message.get("tool_call_id") or "")))
        turn.is_result.append(is_result)
    return turns


def _check_form(number: int, message: Mapping[str, Any]) -> None:
    content: Any = message.get("content")
    is_text = content is None or isinstance(content, str)
    if not is_text and not (_are_mappings(content) and all(isinstance(b.get("text", ""), str) for b in content)):
        raise EncodingError(f"message {number}: content must be text or a list of blocks, got {content!r}")
    for name, keys in (("tools", set()), ("tool_calls", {"name", "arguments"})):
        entries = message.get(name) or ()
        functions = [entry.get("function") for entry in entries] if _are_mappings(entries) else [None]
        if not all(isinstance(function, Mapping) and keys <= function.keys() for function in functions):
            wanted = f" with {' and '.join(sorted(keys, reverse=True))}" if keys else ""
            raise EncodingError(f"message {number}: {name} must be a list, a function{wanted} in each, got {entries!r}")


def _are_mappings(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(entry, Mapping) for entry in value)


def _content_text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    blocks = (
        block.get("text", "") if block.get("type") == "text" else f"[Unsupported {block.get('type')}]"
        for block in content
    )
    return "\n\n".join(blocks)


def _order_results(turns: Sequence[_Turn]) -> None:
    """Put the results inside a turn into the order of the calls they answer; texts between them keep their places."""
    order: dict[str, int] = {}
    for turn in turns:
        if turn.role == "assistant" and turn.message.get("tool_calls"):
            calls = enumerate(turn.message["tool_calls"])
            order = {call.get("id") or call.get("function", {}).get("id", ""): number for number, call in calls}
            order.pop("", None)
        elif turn.role == "user" and order:
            places = [place for place, is_result in enumerate(turn.is_result) if is_result]
            results = sorted((turn.parts[place] for place in places), key=lambda part: order.get(part[1], 0))
            for place, part in zip(places, results, strict=True):
                turn.parts[place] = part


def _last_ask(turns: Sequence[_Turn]) -> int:
    return max((index for index, turn in enumerate(turns) if turn.asks), default=-1)


def _drop_reasoning(turns: Sequence[_Turn]) -> list[_Turn]:
    """Without the developer messages before the last question; the reasoning there is left out when rendering."""
    last = _last_ask(turns)
    return [turn for index, turn in enumerate(turns) if index >= last or turn.role != "developer"]


def _body(turns: Sequence[_Turn], index: int, thinking_mode: str, with_reasoning: bool) -> str:
    turn = turns[index]
    message = turn.message
    if turn.role == "user":
        parts = zip(turn.parts, turn.is_result, strict=True)
        return USER + "\n\n".join(
            f"<tool_result>{text}</tool_result>" if is_result else text for (text, _), is_result in parts
        )
    content = _content_text(message.get("content"))
    if turn.role == "system":
        return content + _extras(message)
    if turn.role == "developer":
        return USER + content + _extras(message)
    if turn.role == "latest_reminder":
        return LATEST_REMINDER + content
    answers_task = index > 0 and turns[index - 1].task is not None
    reasoning = ""
    if thinking_mode == "thinking" and with_reasoning and not answers_task:
        reasoning = (message.get("reasoning_content") or "") + THINK_CLOSE
    calls = _calls(message["tool_calls"]) if message.get("tool_calls") else ""
    return reasoning + content + calls + ("" if message.get("wo_eos") else EOS)


def _cue(turn: _Turn, thinking_mode: str, reasons: bool) -> str:
    """What follows a turn that awaits an answer."""
    if turn.task == "action":
        return ASSISTANT + (THINK_OPEN if thinking_mode == "thinking" else THINK_CLOSE) + TASKS["action"]
    if turn.task is not None:
        return TASKS[turn.task]
    if turn.asks:
        return ASSISTANT + (THINK_OPEN if reasons else THINK_CLOSE)
    return ""


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _extras(message: Mapping[str, Any]) -> str:
    """Tool schemas and the response format of a system or developer message."""
    text = ""
    if message.get("tools"):
        schemas = "\n".join(_json(tool["function"]) for tool in message["tools"])
        text += "\n\n" + _TOOLS_BEFORE_SCHEMAS + schemas + _TOOLS_AFTER_SCHEMAS
    if message.get("response_format"):
        schema = _json(message["response_format"])
        text += f"\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{schema}"
    return text


def _calls(tool_calls: Sequence[Mapping[str, Any]]) -> str:
    lines = ["\n\n" + _CALLS_OPEN]
    for call in tool_calls:
        function = call["function"]
        parameters = [
            f'<{DSML}parameter name="{name}" string="true">{value}{_PARAMETER_CLOSE}'
            if isinstance(value, str)
            else f'<{DSML}parameter name="{name}" string="false">{_json(value)}{_PARAMETER_CLOSE}'
            for name, value in _arguments(function["arguments"]).items()
        ]
        # A call without parameters still has the line between its tags.
        lines += [f'<{DSML}invoke name="{function["name"]}">', "\n".join(parameters), _INVOKE_CLOSE]
    return "\n".join([*lines, _CALLS_CLOSE])


def _arguments(arguments: Any) -> Mapping[str, Any]:
    """Parameters of a call: an object, a string holding a JSON object, or any other string as one parameter."""
    if isinstance(arguments, Mapping):
        return arguments
    try:
        decoded = json.loads(arguments)
    except (TypeError, ValueError):
        return {"arguments": arguments}
    return decoded if isinstance(decoded, dict) else {"arguments": decoded}


def parse_completion(text: str, thinking_mode: str = "chat") -> dict[str, Any]:
    """Split one assistant turn, as generated (its end-of-sentence marker included), into its parts.

    Args:
        text: what the model wrote after the cue of `encode_messages`.
        thinking_mode: the mode the prompt was encoded with.
    Returns: ``{"role": "assistant", "content", "reasoning_content", "tool_calls"}``; each call in the OpenAI form, its
        arguments a JSON string.
    Raises: EncodingError (a ValueError) for a missing closing think tag in thinking mode, a missing end marker (only a
        tool block may end without one), text after the tool block, a malformed or unclosed tool block, or a special
        token inside the content.
    Source: the parser in the released checkpoints.
    """
    _check_mode(thinking_mode)
    block_open = "\n\n" + _CALLS_OPEN[:-1]  # the released parser recognises the tag before its last character
    reasoning, rest = "", text
    if thinking_mode == "thinking":
        reasoning, tag, rest = rest.partition(THINK_CLOSE)
        if not tag or block_open in reasoning:
            raise EncodingError(f"the reasoning is not closed: no {THINK_CLOSE} before the answer")

    end, block = rest.find(EOS), rest.find(block_open)
    tool_calls: list[dict[str, Any]] = []
    if block >= 0 and (end < 0 or block < end):
        content = rest[:block]
        tool_calls, tail = _parse_calls(rest[block + len(block_open) :])
        before, tag, after = tail.partition(EOS)
        if before:
            raise EncodingError(f"unexpected text after the tool calls: {before[:40]!r}")
    elif end >= 0:
        content, after = rest[:end], rest[end + len(EOS) :]
    else:
        raise EncodingError(f"the turn does not end: no {EOS}")
    if after:
        raise EncodingError(f"unexpected text after {EOS}: {after[:40]!r}")
    for token in (BOS, EOS, THINK_OPEN, THINK_CLOSE, DSML):
        if token in content or token in reasoning:
            raise EncodingError(f"special token {token} inside the content")
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": tool_calls}


_INVOKE_OPEN = re.compile(rf'<{DSML}invoke\s*name="(.*?)">\n', re.DOTALL)
_PARAMETER = re.compile(rf'<{DSML}parameter name="(.*?)" string="(true|false)">(.*?){_PARAMETER_CLOSE}\n', re.DOTALL)


def _parse_calls(text: str) -> tuple[list[dict[str, Any]], str]:
    """The calls of a block whose opening tag was read up to its ``>``, and what follows the block."""
    if not text.startswith(">\n"):
        raise EncodingError(f"malformed tool block: expected '>' and a line break after its tag, got {text[:20]!r}")
    calls: list[dict[str, Any]] = []
    position = 2
    while not text.startswith(_CALLS_CLOSE, position):
        invoke = _INVOKE_OPEN.match(text, position)
        if invoke is None:
            raise EncodingError(f"malformed or unclosed tool block: {text[position : position + 60]!r}")
        arguments, position = _parse_parameters(text, invoke.end(), invoke[1])
        calls.append({"type": "function", "function": {"name": invoke[1], "arguments": arguments}})
    return calls, text[position + len(_CALLS_CLOSE) :]


def _parse_parameters(text: str, position: int, call: str) -> tuple[str, int]:
    """A call's parameters up to and with its closing tag: a JSON object as text, and where the call ends.

    Values given as JSON are passed through as written, so that numbers keep their digits.
    """
    found: dict[str, str] = {}
    close = _INVOKE_CLOSE + "\n"
    # A call without parameters may have an empty line between its tags.
    if text.startswith("\n" + close, position):
        position += 1
    while not text.startswith(close, position):
        parameter = _PARAMETER.match(text, position)
        if parameter is None or parameter[0].count(f"/{DSML}parameter") != 1:
            raise EncodingError(f"malformed or unclosed parameter of {call}: {text[position : position + 60]!r}")
        name, is_string, value = parameter.groups()
        if name in found:
            raise EncodingError(f"parameter {name!r} of {call} is given twice")
        found[name] = _json(value) if is_string == "true" else value
        position = parameter.end()
    return "{" + ", ".join(f"{_json(name)}: {value}" for name, value in found.items()) + "}", position + len(close)
