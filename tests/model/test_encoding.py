"""Prompt encoding against the release's own texts, byte for byte, and the faults both directions must name."""

import copy
import json
from pathlib import Path

import pytest

from dsv4.generation import encoding
from dsv4.generation.encoding import EncodingError, encode_messages, parse_completion

DATA = Path(__file__).parents[1] / "data" / "encoding"
EXTRA = json.loads((DATA / "extra_cases.json").read_text(encoding="utf-8"))
USER = {"role": "user", "content": "hello"}


def released_cases():
    for case in json.loads((DATA / "cases.json").read_text(encoding="utf-8")):
        messages = json.loads((DATA / case["input"]).read_text(encoding="utf-8"))
        if isinstance(messages, dict):
            messages["messages"][0]["tools"] = messages["tools"]
            messages = messages["messages"]
        expected = (DATA / case["output"]).read_bytes()
        yield pytest.param(messages, case["thinking_mode"], expected, id=case["input"])


@pytest.mark.parametrize(("messages", "mode", "expected"), list(released_cases()))
def test_released_text(messages, mode, expected):
    assert encode_messages(messages, thinking_mode=mode).encode() == expected


@pytest.mark.parametrize("case", EXTRA["encode"], ids=lambda case: case["name"])
def test_encode(case):
    before = copy.deepcopy(case)
    assert encode_messages(case["messages"], **case["kwargs"]) == case["output"]
    assert case == before, "the caller's messages were changed"


@pytest.mark.parametrize("case", EXTRA["parse"], ids=lambda case: case["name"])
def test_parse(case):
    if "error" in case:
        with pytest.raises(EncodingError) as caught:
            parse_completion(case["text"], case["thinking_mode"])
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, AssertionError), "the release's callers catch AssertionError"
        assert "\n" not in str(caught.value)
    else:
        assert parse_completion(case["text"], case["thinking_mode"]) == case["parsed"]


def test_counts():
    assert (len(EXTRA["encode"]), len(EXTRA["parse"]), len(list(released_cases()))) == (23, 10, 4)


@pytest.mark.parametrize("mode", ["chat", "thinking"])
def test_round_trip(mode):
    """What an assistant turn encodes to parses back to it, whatever its text holds."""
    answer = {
        "role": "assistant",
        "content": 'line\n\n"quoted" <tag> 为什么 \\',
        "reasoning_content": "step\n" if mode == "thinking" else "",
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": "f", "arguments": '{"a": "x\\n<b>", "n": 1.50, "o": {"k": [null]}}'},
            },
            {"type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }
    prompt = encode_messages([USER], mode)
    text = encode_messages([USER, answer], mode)
    assert text.startswith(prompt)
    parsed = parse_completion(text[len(prompt) :], mode)
    assert parsed["content"] == answer["content"]
    assert parsed["reasoning_content"] == answer["reasoning_content"]
    calls = [call["function"] for call in parsed["tool_calls"]]
    assert [call["name"] for call in calls] == ["f", "g"]
    assert json.loads(calls[0]["arguments"]) == {"a": "x\n<b>", "n": 1.5, "o": {"k": [None]}}
    assert calls[1]["arguments"] == "{}"


def test_closing_tag_of_another_kind_inside_a_value():
    value = f"</{encoding.DSML}invoke>\n"
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps({"a": value})}}
    text = encode_messages([USER, {"role": "assistant", "content": "", "tool_calls": [call]}])
    parsed = parse_completion(text.split(encoding.THINK_CLOSE)[1])
    assert json.loads(parsed["tool_calls"][0]["function"]["arguments"]) == {"a": value}


def test_context_is_not_written_again():
    context = [
        {"role": "system", "content": "s"},
        USER,
        {"role": "assistant", "content": "a", "reasoning_content": "r"},
    ]
    whole = encode_messages([*context, USER], "thinking", drop_thinking=False)
    rest = encode_messages([USER], "thinking", context=context, drop_thinking=False)
    assert rest
    assert whole.endswith(rest)
    assert encoding.BOS not in rest
    assert whole == encode_messages(context, "thinking", drop_thinking=False) + rest


@pytest.mark.parametrize("cut", range(1, 200, 7))
def test_truncated_tool_block_is_refused(cut):
    text = next(case["text"] for case in EXTRA["parse"] if case["name"] == "tools without eos")
    with pytest.raises(EncodingError):
        parse_completion(text[:-cut])


@pytest.mark.parametrize(
    ("messages", "options", "words"),
    [
        ([{"role": "robot", "content": "x"}], {}, "message 0: unknown role 'robot'"),
        ([USER, {"content": "x"}], {}, "message 1: expected a mapping with a 'role'"),
        ([{"role": "developer", "content": ""}], {}, "message 0: a developer message needs content"),
        ([{**USER, "task": "sing"}], {}, "message 0: unknown task 'sing'"),
        ([USER], {"thinking_mode": "loud"}, "thinking_mode must be 'chat' or 'thinking', got 'loud'"),
        ([USER], {"reasoning_effort": "low"}, "reasoning_effort must be None, 'high' or 'max', got 'low'"),
    ],
)
def test_encode_faults(messages, options, words):
    with pytest.raises(EncodingError) as caught:
        encode_messages(messages, **options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('<｜DSML｜parameter name="b"', '<｜DSML｜parameter name="a"', "'a' of get_weather is given twice"),
        ('string="true"', 'string="yes"', "malformed or unclosed parameter of get_weather"),
        ('invoke name="get_weather"', "invoke name=get_weather", "malformed or unclosed tool block"),
        ("<｜DSML｜tool_calls>\n", "<｜DSML｜tool_calls> \n", "malformed tool block"),
    ],
)
def test_malformed_tool_block(old, new, words):
    text = next(case["text"] for case in EXTRA["parse"] if case["name"] == "tools chat")
    assert old in text
    with pytest.raises(EncodingError) as caught:
        parse_completion(text.replace(old, new, 1))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"content": 5}, {"content": ["hi"]}, {"content": [{"type": "text", "text": 5}]},
        {"tools": [{"type": "function"}]}, {"tools": 3}, {"tools": ["f"]},
        {"tool_calls": [{"id": "1"}]}, {"tool_calls": [{"function": {"name": "f"}}]},
    ],
)  # fmt: skip
def test_fields_of_another_form(fields):
    role = "assistant" if "tool_calls" in fields else "system" if "tools" in fields else "user"
    with pytest.raises(EncodingError, match=r"^message 1: ") as caught:
        encode_messages([USER, {"role": role, "content": "x", **fields}], "chat")
    assert "\n" not in str(caught.value)
