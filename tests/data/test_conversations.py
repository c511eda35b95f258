"""Conversations of several turns: each turn's prompt is what a server would read, in one text or several."""

from typing import Any

import numpy as np
import pytest
from chats import CHATML, END, NO_SYSTEM, TAGGED, THINKING, blank_first, tokenizer

from ppow_jax.data.conversations import Conversation, spans
from ppow_jax.data.prompt import Prompt
from ppow_jax.errors import UserError
from ppow_jax.targets.tokenizer import Tokenizer

# As Qwen3's: thinking of earlier turns is dropped, and enable_thinking=false begins an answer with an empty
# one.
NO_THOUGHT = "<think>\n\n</think>\n\n"
QWEN = (
    "{% for m in messages %}{% set c = m.content.split('</think>')[-1].lstrip('\n') %}<s>{{ m.role }}\n"
    "{{ c if m.role == 'assistant' else m.content }}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}" + NO_THOUGHT + "{% endif %}{% endif %}"
)


def talk(text: Tokenizer, said: list[str], **fields: Any) -> Conversation:
    """Asks all turns; an answer is text with its special tokens."""
    conversation = Conversation(Prompt("p", "", ("a", "b", "c")[: len(said)], **fields))
    for turn, answer in enumerate(said):
        conversation.ask(conversation.question(text, turn))
        conversation.answer(text.encode(answer))
    return conversation


def read(text: Tokenizer, conversation: Conversation) -> list[tuple[str, list[str]]]:
    """Of each text: all of it, and what in it is the assistant's."""
    found = []
    for part in conversation.texts:
        where = spans(np.array(part.assistant))
        found.append((text.decode(part.tokens), [text.decode(part.tokens[a:b]) for a, b in where]))
    return found


def test_a_template_that_only_adds_keeps_one_text_with_the_ids_that_were_written():
    text = tokenizer()
    conversation = Conversation(Prompt("p", "", ("a", "b")))
    conversation.ask(conversation.question(text, 0))
    conversation.answer([*text.encode("x"), *text.encode("y"), END])
    question = conversation.question(text, 1)
    assert text.decode(question.ids) == "\n<s>user\nb<e>\n<s>assistant\n"
    assert not question.afresh and question.length == len(conversation.tokens) + len(question.ids)
    assert question.text == "<s>user\na<e>\n<s>assistant\nxy<e>\n<s>user\nb<e>\n<s>assistant\n"
    conversation.ask(question)
    conversation.answer([END])
    assert read(text, conversation) == [(question.text + "<e>", ["xy<e>", "<e>"])]
    assert [record["id"] for record in conversation.records()] == ["p"]


def test_an_answer_that_was_cut_gets_its_end_from_the_template():
    text = tokenizer()
    whole, _ = read(text, talk(text, ["x", "y<e>"]))[0]
    assert whole == "<s>user\na<e>\n<s>assistant\nx<e>\n<s>user\nb<e>\n<s>assistant\ny<e>"


TURN = "<s>user\n{}<e>\n<s>assistant\n{}"


@pytest.mark.parametrize(
    ("template", "variables", "answers", "texts"),
    [
        pytest.param(
            THINKING, {}, ["r</think>x<e>", "s</think>y<e>"],
            [(TURN.format("a", "<think>"), "r</think>x<e>"),
             (TURN.format("a", "x<e>\n") + TURN.format("b", "<think>"), "s</think>y<e>")],
            id="thinking of earlier turns is dropped"),
        pytest.param(
            QWEN, {}, ["<think>\nr\n</think>\n\nx<e>", "y<e>"],
            [(TURN.format("a", ""), "<think>\nr\n</think>\n\nx<e>"),
             (TURN.format("a", "x<e>\n") + TURN.format("b", ""), "y<e>")],
            id="thinking that was written is dropped"),
        pytest.param(
            QWEN, {"enable_thinking": False}, ["x<e>", "y<e>"],
            [(TURN.format("a", NO_THOUGHT), "x<e>"),
             (TURN.format("a", "x<e>\n") + TURN.format("b", NO_THOUGHT), "y<e>")],
            id="what the answer began with is dropped"),
        pytest.param(
            CHATML.replace("{{ m.content }}", "{{ m.content | trim }}"), {}, ["x <e>", "y<e>"],
            [(TURN.format("a", ""), "x <e>"), (TURN.format("a", "x<e>\n") + TURN.format("b", ""), "y<e>")],
            id="blanks are trimmed"),
        pytest.param(
            CHATML.replace("{{ m.content }}", "{{ m.content }} "), {}, ["x<e>", "y<e>"],
            [("<s>user\na <e>\n<s>assistant\n", "x<e>"),
             ("<s>user\na <e>\n<s>assistant\nx <e>\n<s>user\nb <e>\n<s>assistant\n", "y<e>")],
            id="a blank is put before the end of a turn"),
        pytest.param(
            CHATML, {}, ["x<eot>", "y<e>"],
            [(TURN.format("a", ""), "x<eot>"), (TURN.format("a", "x<e>\n") + TURN.format("b", ""), "y<e>")],
            id="the target ended with another token"),
        pytest.param(
            CHATML, {}, ["x<s>z<e>", "y<e>"],
            [(TURN.format("a", ""), "x<s>z<e>"),
             (TURN.format("a", "xz<e>\n") + TURN.format("b", ""), "y<e>")],
            id="a special token within an answer, which servers leave out"),
        pytest.param(
            "{{ messages[-1].content }}<e>", {}, ["x<e>", "y<e>"],
            [("a<e>", "x<e>"), ("b<e>", "y<e>")],
            id="the template forgets"),
    ],
)  # fmt: skip
def test_a_turn_has_a_text_of_its_own_where_the_template_changes_what_was_said(
    template, variables, answers, texts
):
    text = tokenizer(template, **variables)
    conversation = talk(text, answers)
    assert read(text, conversation) == [(before + answer, [answer]) for before, answer in texts]
    assert [record["id"] for record in conversation.records()] == ["p", "p"]
    assert [record["tokens"].tolist() for record in conversation.records()] == [
        text.encode(before + answer) for before, answer in texts
    ]


def test_answers_of_the_data_are_no_answers_of_the_target():
    text = tokenizer(THINKING)
    conversation = talk(text, ["r</think>x<e>", "y<e>"], answers=("other", "others"))
    assert "other" not in "".join(whole for whole, _ in read(text, conversation))
    question = conversation.question(text, 1)
    assert question.afresh and question.length == len(question.ids)


def test_a_text_of_its_own_goes_on_where_it_can():
    """The first turn thinks, the others do not: one text, and one more for the others together."""
    text = tokenizer(QWEN)
    found = read(text, talk(text, ["<think>\n</think>\nx<e>", "y<e>", "z<e>"]))
    first, second = TURN.format("a", "x<e>\n"), TURN.format("b", "y<e>\n")
    assert [whole for whole, _ in found] == [
        TURN.format("a", "<think>\n</think>\nx<e>"),
        first + second + TURN.format("c", "z<e>"),
    ]
    assert found[1][1] == ["y<e>", "z<e>"]


def test_a_tokenizer_that_puts_a_blank_first_adds_none_between_turns():
    template = (
        "{% for m in messages %}{{ '/' + m.content if m.role == 'user' else m.content + '</s>' }}{% endfor %}"
    )
    text = blank_first(template)
    conversation = Conversation(Prompt("p", "", ("a", "b")))
    conversation.ask(conversation.question(text, 0))
    assert conversation.tokens == text.encode("/a")
    conversation.answer([2, 5, 1])  # " c" and the end
    assert text.encode("/a c</s>/b") == [*conversation.tokens, *conversation.question(text, 1).ids]
    assert not conversation.question(text, 1).afresh


def test_a_prompt_that_the_template_refuses_is_named():
    two = "{% if messages | length > 1 %}{{ raise_exception('one question') }}{% endif %}" + CHATML
    for template, fields in ((NO_SYSTEM, {"system": "be"}), (two, {})):
        prompt, text = Prompt("mine", "", ("a", "b"), **fields), tokenizer(template)
        with pytest.raises(
            UserError, match=r"^prompt 'mine': chat template: line 1: (no system|one question)$"
        ):
            Conversation(prompt).check(text)
    with pytest.raises(UserError, match=r"^prompt .mine.: chat template: line 1: no system$"):
        Conversation(Prompt("mine", "", ("a",), "be")).question(tokenizer(NO_SYSTEM), 0)
    Conversation(Prompt("mine", "", ("a", "b"), "be")).check(tokenizer())


def test_a_prompt_of_which_the_template_makes_nothing():
    with pytest.raises(
        UserError, match=r"^prompt 'p': found no tokens in '', which the template makes of it"
    ):
        talk(tokenizer("{{ messages[0].content if messages[0].content == 'what' }}"), ["x"])


def test_a_system_message_stands_before_all_turns():
    text = tokenizer()
    assert read(text, talk(text, ["x<e>", "y<e>"], system="be"))[0][0] == (
        "<s>system\nbe<e>\n" + TURN.format("a", "x<e>\n") + TURN.format("b", "y<e>")
    )


def taken(template: str, answers: tuple[str, ...], longest: int = 999) -> tuple[int, list]:
    text = tokenizer(template)
    conversation = Conversation(Prompt("p", "", ("a", "b", "c")[: len(answers)], "", answers))
    conversation.take(text, longest)
    return conversation.answered, read(text, conversation)


@pytest.mark.parametrize("template", [CHATML, TAGGED.replace("{{ '\n' }}", "\n\n")])
def test_answers_that_are_there_are_taken_as_the_template_writes_them(template):
    assert taken(template, ("x", "y z")) == (
        2,
        [(TURN.format("a", "x<e>\n") + TURN.format("b", "y z<e>"), ["x<e>", "y z<e>"])],
    )


def test_taken_answers_of_a_template_that_changes_what_was_said():
    plain = "{{ c if m.role == 'assistant' else m.content }}<e>"
    said = "{% generation %}{{ m.content if loop.last else c }}<e>{% endgeneration %}"
    tagged = QWEN.replace(
        plain, "{% if m.role == 'assistant' %}" + said + "{% else %}{{ m.content }}<e>{% endif %}{{ '' }}"
    )
    count, found = taken(tagged, ("<think>\nr\n</think>\nx", "y"))
    assert count == 2 and found == [
        (TURN.format("a", "<think>\nr\n</think>\nx<e>"), ["<think>\nr\n</think>\nx<e>"]),
        (TURN.format("a", "x<e>\n") + TURN.format("b", "y<e>"), ["y<e>"]),
    ]


def test_taken_answers_end_before_a_text_is_too_long():
    whole = len(tokenizer().encode(TURN.format("a", "x<e>\n") + TURN.format("b", "y<e>")))
    assert taken(CHATML, ("x", "y"), whole)[0] == 2
    assert taken(CHATML, ("x", "y"), whole - 1) == (1, [(TURN.format("a", "x<e>"), ["x<e>"])])
    assert taken(CHATML, ("x", "y"), 5) == (0, [("", [])])


def test_answers_that_the_template_does_not_tell_from_the_prompt_are_refused():
    with pytest.raises(
        UserError, match=r"^prompt 'p': chat template: with the response, .*keep_answers=False$"
    ):
        taken(THINKING, ("x",))
