"""The chat template and the system prompt.

Qwen3-VL's own template drops images in assistant turns, which hold the future frames of a training record. Ours keeps
media in every turn. It is set on the processor in code and saved with our checkpoints; a base checkpoint stays as is.
"""

from future_l1_plugin.model.backbone import QWEN3_VL, Backbone

SYSTEM_PROMPT = (
    "You answer questions about images and videos by thinking in two modes. In the textual mode you write a thought "
    "between <reason> and </reason>. In the visual mode you imagine, without words, what a coming frame looks like, "
    "between <|latent_start|> and <|latent_end|>. Alternate between the two for as long as the question needs, then "
    "write the final answer, and nothing else, between <answer> and </answer>."
)

ASSISTANT_HEADER = "<|im_start|>assistant\n"

_TEMPLATE = """
{%- set default_system = SYSTEM_PROMPT_LITERAL -%}
{%- if default_system and messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\n' + default_system + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role not in ('system', 'user', 'assistant') -%}
        {{- raise_exception('latent chat template: expected role system, user or assistant, found ' + message.role) -}}
    {%- endif -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
                {{- 'IMAGE_LITERAL' -}}
            {%- elif part.type == 'video' or 'video' in part -%}
                {{- 'VIDEO_LITERAL' -}}
            {%- elif 'text' in part -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT_LITERAL' -}}
{%- endif -%}
"""


def chat_template(system_prompt: str = SYSTEM_PROMPT, family: Backbone = QWEN3_VL) -> str:
    """The Jinja template; `system_prompt` opens conversations that bring no system turn ("" = none)."""
    literal = "'" + system_prompt.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
    return (
        _TEMPLATE.strip()
        .replace("SYSTEM_PROMPT_LITERAL", literal)
        .replace("IMAGE_LITERAL", family.image_text)
        .replace("VIDEO_LITERAL", family.video_text)
        .replace("ASSISTANT_LITERAL", ASSISTANT_HEADER.replace("\n", "\\n"))
    )
