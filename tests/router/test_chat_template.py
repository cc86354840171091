"""Templates render as `transformers` renders them."""

from __future__ import annotations

import pytest

from services.router.text import ChatTemplateError
from services.router.text.chat_template import ChatTemplate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is <b>1+1</b>? "},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Danke, schön 🙂"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'"
        " + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "whitespace": """{{ bos_token }}
    {%- for message in messages %}
        {%- if message.role == 'system' %}
            {%- continue %}
        {%- endif %}
        [{{ message.role }}] {{ message.content | trim }}{{ eos_token }}
    {% endfor %}
    {%- if add_generation_prompt %}[assistant]{% endif %}
""",
    "tools": (
        "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% set ns = namespace(n=0) %}"
        "{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m.content }};{% endfor %}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}|{% endif %}{% endfor %}"
    ),
    "variables": "{% if enable_thinking is defined and not enable_thinking %}quiet{% endif %}{{ messages[0].content }}",
    "break": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
}


@pytest.fixture(scope="module")
def render_reference():
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(template, messages, tools=None, **options):
        rendered, _ = render_jinja_template([messages], tools=tools, chat_template=template, **TOKENS, **options)
        return rendered[0]

    return render


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True}, {"tools": TOOLS}])
def test_renders_as_transformers_does(render_reference, name, options):
    expected = render_reference(TEMPLATES[name], MESSAGES, **{"add_generation_prompt": False, **options})
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    assert template.render(MESSAGES, **{"add_generation_prompt": False, **options}) == expected


@pytest.mark.parametrize("name", ["chatml", "whitespace"])
@pytest.mark.parametrize("text", ["The answer", "The answer ", "\n  x"])
def test_continues_the_final_message_as_transformers_does(render_reference, name, text):
    messages = [*MESSAGES, {"role": "assistant", "content": text}]
    expected = render_reference(TEMPLATES[name], messages, continue_final_message=True, add_generation_prompt=False)
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    assert template.render(messages, add_generation_prompt=False, continue_final_message=True) == expected


def test_passes_the_clients_variables_on():
    template = ChatTemplate(TEMPLATES["variables"], TOKENS)
    assert template.render(MESSAGES[:1], variables={"enable_thinking": False}) == "quietBe brief."
    # They cannot replace the conversation.
    assert template.render(MESSAGES[:1], variables={"messages": [{"content": "x"}]}) == "Be brief."


def test_text_parts_become_text_unless_the_template_goes_through_them():
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert ChatTemplate("{{ messages[0].content }}", TOKENS).render(messages) == "a\nb"
    looping = "{% for m in messages %}{% for part in m['content'] %}<{{ part.text }}>{% endfor %}{% endfor %}"
    assert ChatTemplate(looping, TOKENS).render(messages) == "<a><b>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.foo.bar }}", "cannot render"),
        ("{{ messages[0]['content'] + 1 }}", "cannot render"),
        ("{{ messages.append(1) }}", "cannot render"),
        ("{{ messages.__class__.__mro__ }}", "cannot render"),
        ("{% for x in range(10 ** 9) %}{% endfor %}", "cannot render"),
    ],
)
def test_what_a_template_trips_over_is_one_error(template, message):
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(template, TOKENS).render(MESSAGES)


def test_a_malformed_template_is_refused():
    with pytest.raises(ChatTemplateError, match="cannot be parsed"):
        ChatTemplate("{% for %}", TOKENS)


def test_continuing_needs_a_text_that_the_template_renders():
    with pytest.raises(ChatTemplateError, match="does not render"):
        ChatTemplate("nothing", TOKENS).render(MESSAGES, continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="no text to continue"):
        ChatTemplate("x", TOKENS).render([{"role": "assistant", "content": None}], continue_final_message=True)
