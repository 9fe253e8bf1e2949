"""Chat templates of the shapes that models come with, without marks.

Written here after the shape of each family: what opens a turn, what ends it, where tools and the
system's words go, what is refused, what later turns change.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.worker.training.conftest import make_tokenizer
from worker.training.data.rendering import LossOn, Renderer

TODAY = datetime(2024, 7, 26, tzinfo=UTC)

LLAMA_3 = (
    "{% for m in messages %}"
    "{% set turn = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set turn = bos_token + turn %}{% endif %}{{ turn }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
LLAMA_31 = """{{- bos_token }}
{%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}{{- "Environment: ipython\n" }}{%- endif %}
{{- "Cutting Knowledge Date: December 2023\nToday Date: " + date_string + "\n\n" }}
{{- system_message + "<|eot_id|>" }}
{%- if tools is not none %}
    {%- set first_user_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' }}
    {{- "Given the following functions, please respond with a JSON for a function call.\n\n" }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
    {{- first_user_message + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or message.tool_calls) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.tool_calls %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}" }}{{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {{- message.content | tojson }}{{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

QWEN_TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
"""
QWEN_CALLS = """
        {%- for call in message.tool_calls or [] %}
            {%- if loop.index0 > 0 or content %}{{- '\n' }}{%- endif %}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
QWEN_25 = (
    "{%- if not tools and messages[0].role != 'system' %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    + QWEN_TOOLS
    + """{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>assistant\n' + content }}"""
    + QWEN_CALLS
)
QWEN_3 = (
    QWEN_TOOLS
    + """{%- set ns = namespace(asked=messages | length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.found and message.role == "user" %}
        {%- set ns.asked = messages | length - 1 - loop.index0 %}{%- set ns.found = true %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.asked and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}{{- content }}{%- endif %}"""
    + QWEN_CALLS
)
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
)
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}"
    "{% for m in turns %}" + ALTERNATE + "{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if loop.first and system is defined %}{{ system + '\n\n' }}{% endif %}"
    "{{ m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Tools stand before the last user turn, so they move as the conversation goes on.
MISTRAL_TOOLS = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools and message == user_messages[-1] %}
            {{- "[AVAILABLE_TOOLS] " + tools | tojson + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " }}
        {%- if loop.first and system_message is defined %}{{- system_message + "\n\n" }}{%- endif %}
        {{- message["content"] + "[/INST]" }}
    {%- elif message.tool_calls %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {{- '{"name": "' + tool_call.function.name + '", "arguments": ' }}
            {{- tool_call.function.arguments | tojson }}
            {{- '}' if loop.last else '}, ' }}
        {%- endfor %}{{- "]" + eos_token }}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"] + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message["content"] | tojson + "}[/TOOL_RESULTS]" }}
    {%- endif %}
{%- endfor %}"""

GEMMA_TURNS = (
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + m['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% set first = '' %}"
    "{% for m in messages %}" + ALTERNATE + GEMMA_TURNS
)
GEMMA_3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}" + ALTERNATE + GEMMA_TURNS
)

PHI_3 = (
    "{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI_4 = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template, and what it makes of a conversation.

    Attributes:
        special: Its special tokens, besides those of every tokenizer here.
        end: What ends a turn.
        lead: What comes before an answer, and is a part of it.
        think: What the last answer begins with where it has no reasoning.
        call: What a call of ``f`` with ``{"x": 1}`` is; None: there are no tools.
        system: Whether it has a place for the system's words.
    """

    template: str
    special: tuple[str, ...]
    bos: str
    eos: str
    end: str
    lead: str = ""
    think: str = ""
    call: str | None = None
    system: bool = True

    def renderer(self, loss_on: LossOn = "assistant") -> Renderer:
        return Renderer(self.tokenizer(), loss_on, today=TODAY)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = make_tokenizer(self.template)
        tokenizer.add_tokens([AddedToken(token, special=True) for token in self.special])
        tokenizer.bos_token, tokenizer.eos_token = self.bos, self.eos
        return tokenizer


LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
INST = ("<s>", "</s>", "[INST]", "[/INST]")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
CALLS = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'

FAMILIES = {
    "llama 3": Family(LLAMA_3, LLAMA, LLAMA[0], "<|eot_id|>", "<|eot_id|>"),
    "llama 3.1": Family(
        LLAMA_31,
        LLAMA,
        LLAMA[0],
        "<|eot_id|>",
        "<|eot_id|>",
        call='{"name": "f", "parameters": {"x": 1}}',
    ),
    "qwen 2.5": Family(QWEN_25, (), "<|endoftext|>", "<|im_end|>", "<|im_end|>", call=CALLS),
    "qwen 3": Family(
        QWEN_3,
        (),
        "<|endoftext|>",
        "<|im_end|>",
        "<|im_end|>",
        think="<think>\n\n</think>\n\n",
        call=CALLS,
    ),
    "mistral": Family(MISTRAL, INST, "<s>", "</s>", "</s>", lead=" "),
    "mistral with tools": Family(
        MISTRAL_TOOLS,
        (*INST, "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
        "<s>",
        "</s>",
        "</s>",
        lead=" ",
        call='[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]',
    ),
    "gemma 2": Family(GEMMA_2, GEMMA, "<bos>", "<eos>", "<end_of_turn>", system=False),
    "gemma 3": Family(GEMMA_3, GEMMA, "<bos>", "<eos>", "<end_of_turn>"),
    "phi 3": Family(
        PHI_3,
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|endoftext|>",
        "<|endoftext|>",
        "<|end|>",
    ),
    "phi 4": Family(PHI_4, ("<|im_sep|>",), "<|endoftext|>", "<|im_end|>", "<|im_end|>"),
    "chatml": Family(CHATML, (), "<|endoftext|>", "<|im_end|>", "<|im_end|>"),
}
