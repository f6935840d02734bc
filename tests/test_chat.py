"""Chat templates, and which tokens of a conversation are learned."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jlora import chat

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIAL += ["<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<|user|>"]
SPECIAL += ["<|assistant|>", "<|end|>"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        " + message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
        "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
        "{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "phi3": (  # ends a finished conversation with one more token, so prefixes disagree
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content']"
        " + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% else %}{{ eos_token }}{% endif %}"
    ),
    "no generation prompt": CHATML.partition("{% if add_gen")[0],
    "generation blocks": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "generation blocks without the end token": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
        "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "thinking of the last turn only": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}"
        "{% endif %}{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
ENDS = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>", "phi3": "<|end|>"}
CONVERSATION = [
    {"role": "user", "content": "What is  1+1? <b>é🙂"},
    {"role": "assistant", "content": "It is 2.\nI'd  say: 日本 🙂"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes, 'sure' & done"},
]


def make_backend(merges: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 if merges else 256,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = " ".join([*TEMPLATES.values(), *(message["content"] for message in CONVERSATION)])
    backend.train_from_iterator([text], trainer)
    backend.add_special_tokens(SPECIAL)
    return backend


def make_tokenizer(template: str | None, *, merges: bool = True, **config) -> chat.Tokenizer:
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template} | config
    files = {"tokenizer.json": make_backend(merges).to_str()}
    return chat.Tokenizer.from_files(files | {"tokenizer_config.json": json.dumps(config)})


def learned_runs(tokenizer, tokens, loss_mask) -> list[str]:
    runs, previous = [], False
    for token, learned in zip(tokens, loss_mask, strict=True):
        if learned and not previous:
            runs.append([])
        if learned:
            runs[-1].append(token)
        previous = learned
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("merges", [False, True], ids=["bytes", "merged"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_learned_is_what_the_assistant_says_and_its_end_of_turn(name, merges):
    tokenizer = make_tokenizer(TEMPLATES[name], merges=merges)
    tokens, loss_mask = chat.encode_messages(tokenizer, CONVERSATION)
    end = ENDS.get(name, "<|im_end|>")
    first, second = (CONVERSATION[i]["content"] + end for i in (1, 3))
    if name.startswith("thinking"):  # what follows the generation prompt is learned
        second = "<think>\n\n</think>\n\n" + second
    runs = learned_runs(tokenizer, tokens, loss_mask)
    if name == "mistral":  # "[/INST]" is followed by a space that belongs to the first token
        runs = [run.lstrip() for run in runs]
    assert runs == [first, second]
    text = chat.render(tokenizer, CONVERSATION)
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text
    assert tokens == tokenizer.encode(text)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_is_followed_by_what_is_learned(name):
    tokenizer = make_tokenizer(TEMPLATES[name], merges=False)
    for turn in (1, 3):
        tokens, loss_mask = chat.encode_messages(tokenizer, CONVERSATION[: turn + 1])
        prompt = chat.encode_prompt(tokenizer, CONVERSATION[:turn])
        assert tokens[: len(prompt)] == prompt
        assert loss_mask[len(prompt)]
        assert loss_mask[: len(prompt)].count(True) == sum(
            len(tokenizer.encode(CONVERSATION[i]["content"])) + 1 + (name == "mistral")
            for i in range(1, turn, 2)
        )


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_equal_transformers(name):
    transformers = pytest.importorskip("transformers")
    tokenizer = make_tokenizer(TEMPLATES[name])
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=make_backend(True), bos_token="<s>", eos_token="</s>"
    )
    reference.chat_template = TEMPLATES[name]
    options = {"return_dict": True, "return_assistant_tokens_mask": "generation" in name}
    expected = reference.apply_chat_template(CONVERSATION, **options)
    assert chat.encode_messages(tokenizer, CONVERSATION)[0] == expected["input_ids"]
    text = reference.apply_chat_template(CONVERSATION, tokenize=False)
    assert chat.render(tokenizer, CONVERSATION) == text
    if name != "no generation prompt":  # there we write the header that the template forgets
        prompt = reference.apply_chat_template(
            CONVERSATION[:3], add_generation_prompt=True, return_dict=True
        )
        assert chat.encode_prompt(tokenizer, CONVERSATION[:3]) == prompt["input_ids"]


def test_template_without_end_token_gets_one_inside_the_loss():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = make_tokenizer(template, merges=False)
    tokens, loss_mask = chat.encode_messages(tokenizer, CONVERSATION)
    assert tokens[-1] == tokenizer.eos_id
    assert learned_runs(tokenizer, tokens, loss_mask) == [
        CONVERSATION[1]["content"] + "\n",
        CONVERSATION[3]["content"] + "\n</s>",
    ]
    ends_with_user = chat.encode_messages(tokenizer, CONVERSATION[:3])[0]
    assert tokenizer.eos_id not in ends_with_user


def test_system_and_tool_turns_are_not_learned():
    tokenizer = make_tokenizer(CHATML)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "get_weather()"},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": ""},
    ]
    runs = learned_runs(tokenizer, *chat.encode_messages(tokenizer, messages))
    assert runs == ["get_weather()<|im_end|>", "<|im_end|>"]


def test_completions_only_off_learns_every_token():
    tokenizer = make_tokenizer(CHATML)
    tokens, loss_mask = chat.encode_messages(tokenizer, CONVERSATION, completions_only=False)
    assert tokens == chat.encode_messages(tokenizer, CONVERSATION)[0]
    assert all(loss_mask)


def test_same_words_from_user_and_assistant_are_told_apart():
    tokenizer = make_tokenizer(CHATML)
    messages = [{"role": role, "content": "same"} for role in ("user", "assistant") * 2]
    tokens, loss_mask = chat.encode_messages(tokenizer, messages)
    assert learned_runs(tokenizer, tokens, loss_mask) == ["same<|im_end|>"] * 2
    assert sum(loss_mask) == 2 * len(tokenizer.encode("same<|im_end|>"))


def test_template_that_hides_the_assistant_is_refused():
    template = "{% for m in messages | reverse %}{{ m.content | length }};{% endfor %}"
    with pytest.raises(ValueError, match="cannot be told from the rest"):
        chat.encode_messages(make_tokenizer(template), CONVERSATION)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], ["non-empty list"]),
        ({"role": "user", "content": "x"}, ["non-empty list"]),
        ([{"content": "x"}], ["no role", "system, user, assistant, tool"]),
        ([{"role": "robot", "content": "x"}], ["'robot'", "system, user, assistant, tool"]),
        ([{"role": "user"}], ["Message 1 of 1", "content"]),
        ([{"role": "user", "content": 3}], ["content", "3"]),
        (["hello"], ["no role", "hello"]),
        ([{"role": "user", "content": "x"}], ["No assistant message", "user"]),
    ],
)
def test_malformed_messages_are_named(messages, words):
    with pytest.raises(ValueError) as error:
        chat.encode_messages(make_tokenizer(CHATML), messages)
    for word in words:
        assert word in str(error.value)


def test_model_without_template_says_which_data_works():
    tokenizer = make_tokenizer(None)
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="prompt/completion"):
        chat.encode_messages(tokenizer, CONVERSATION)


def test_what_the_template_refuses_is_passed_on():
    messages = [{"role": "system", "content": "x"}, *CONVERSATION]
    with pytest.raises(ValueError, match="System role not supported"):
        chat.encode_messages(make_tokenizer(TEMPLATES["gemma"]), messages)
    with pytest.raises(ValueError, match="not valid jinja2"):
        chat.render(make_tokenizer("{% for %}"), CONVERSATION)


def test_template_cannot_reach_python():
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match="unsafe"):
        chat.render(make_tokenizer(template), CONVERSATION)
    with pytest.raises(ValueError, match="refuses"):
        chat.render(make_tokenizer("{{ messages.append(1) }}"), CONVERSATION)


def test_every_token_that_ends_a_turn_stops():
    files = {
        "tokenizer.json": make_backend(False).to_str(),
        "tokenizer_config.json": json.dumps({"eos_token": {"content": "</s>"}}),
        "generation_config.json": json.dumps({"eos_token_id": [257, 258]}),
        "chat_template.jinja": CHATML,
    }
    tokenizer = chat.Tokenizer.from_files(files)
    ids = {token: tokenizer.backend.token_to_id(token) for token in SPECIAL}
    assert tokenizer.eos_id == ids["</s>"] == tokenizer.pad_id
    assert {257, 258, ids["<|im_end|>"], ids["<|eot_id|>"]} <= set(tokenizer.eos_ids)
    assert tokenizer.bos_id is None
    assert tokenizer.chat_template == CHATML
    assert tokenizer.vocab_size == 256 + len(SPECIAL)


def test_named_templates_and_special_tokens_map_are_read():
    templates = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    files = {
        "tokenizer.json": make_backend(False).to_str(),
        "tokenizer_config.json": json.dumps({"chat_template": templates}),
        "special_tokens_map.json": json.dumps({"eos_token": "<|im_end|>", "pad_token": "<s>"}),
    }
    tokenizer = chat.Tokenizer.from_files(files)
    assert tokenizer.chat_template == CHATML
    assert tokenizer.eos_id == tokenizer.backend.token_to_id("<|im_end|>")
    assert tokenizer.pad_id == tokenizer.backend.token_to_id("<s>")


def test_encode_adds_nothing_and_decode_gives_the_text_back():
    tokenizer = make_tokenizer(CHATML)
    text = "  x\n\n<s>é日本🙂\t<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert tokenizer.encode("") == []
    assert "<s>" not in tokenizer.decode(tokenizer.encode(text))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "No tokenizer.json"),
        ({"tokenizer.json": "{"}, "tokenizer.json cannot be read"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "["}, "tokenizer_config.json is not"),
    ],
)
def test_broken_files_are_named(files, words):
    with pytest.raises(ValueError, match=words):
        chat.Tokenizer.from_files(files)


def test_tokenizer_without_an_end_of_text_is_refused():
    backend = tokenizers.Tokenizer(models.BPE())
    with pytest.raises(ValueError, match="eos_token"):
        chat.Tokenizer.from_files({"tokenizer.json": backend.to_str()})
