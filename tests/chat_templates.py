"""Small chat templates in the manner of those that models ship with, for ``test_chat.py``; written for these tests."""

from __future__ import annotations

CHATML = """
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe useful.<|im_end|>\\n' }}{% endif %}
{%- if tools %}{{ '<tools>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '</tools>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
"""Like Qwen2.5: joins contents to text, so that anything else raises."""

THINKING = """
{%- for message in messages %}
{%- set content = message.content if message.content is string else '' %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- set reasoning = '' %}
{%- if '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.last %}{{ '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
{{- content }}
{%- for call in message.tool_calls %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
"""Like Qwen3: a content that is no text vanishes, reasoning of earlier turns is left out."""

DATED = """
{{- bos_token }}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content | trim %}
{%- set messages = messages[1:] %}
{%- endif %}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{{- '<|head|>system\\nToday Date: ' + date_string + '\\n' + system + '<|eot|>' }}
{%- if tools is not none %}{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}{% endif %}
{%- for message in messages %}
{%- if 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one tool call at a time') }}{% endif %}
{{- '<|head|>assistant\\n' + (message.tool_calls[0].function | tojson) + '<|eot|>' }}
{%- elif message.role == 'tool' %}
{{- '<|head|>ipython\\n' + (message.content | tojson) + '<|eot|>' }}
{%- else %}
{{- '<|head|>' + message.role + '\\n' + message.content | trim + '<|eot|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant\\n' }}{% endif %}
"""
"""Like Llama 3.x: the date, trimmed contents, one call a turn."""

ALTERNATING = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' + message.content | trim + '</turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}
"""
"""Like Gemma: no system role, no tools, strict order."""

ROLE_TAGS = """
{%- for message in messages %}
{%- if message.role == 'system' and message.content %}{{ '<|system|>\\n' + message.content + '<|end|>\\n' }}
{%- elif message.role == 'user' %}{{ '<|user|>\\n' + message.content + '<|end|>\\n' }}
{%- elif message.role == 'assistant' %}{{ '<|assistant|>\\n' + message.content + '<|end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}
"""
"""Like Phi: roles that it does not know vanish, and an end token closes what has no generation prompt."""

INSTRUCTION = """
{{- bos_token }}
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if system else messages %}
{%- for message in turns %}
{%- if message.role == 'user' %}{{ '[INST] ' + (system if loop.last else '') + message.content + ' [/INST]' }}
{%- elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}
{%- else %}{{ raise_exception('only user and assistant roles') }}{% endif %}
{%- endfor %}
"""
"""Like Mistral: the system text before the last question, and no generation prompt at all."""

REASONING = """
{{- bos_token }}
{%- for message in messages if message.role == 'system' %}{{ message.content }}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<User>' + message.content }}
{%- elif message.role == 'assistant' and message.content is none %}
{{- '<Assistant>' }}{% for call in message.tool_calls %}{{ '<call>' + call.function.name + '</call>' }}{% endfor %}<end>
{%- elif message.role == 'assistant' %}{{ '<Assistant>' + message.content.split('</think>')[-1] + '<end>' }}
{%- elif message.role == 'tool' %}{{ '<output>' + message.content + '</output>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<Assistant><think>\\n' }}{% endif %}
"""
"""Like DeepSeek: calls only beside a content of none, reasoning of any turn left out, an opened one for the answer."""

CHANNELS = """
{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- if messages[0].role in ('system', 'developer') %}
{{- '<|start|>developer<|message|># Instructions\\n' + messages[0].content }}
{%- if tools %}{% for tool in tools %}{{ '\\ntype ' + tool.function.name }}{% endfor %}{% endif %}
{{- '<|end|>' }}
{%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<|start|>user<|message|>' + message.content + '<|end|>' }}
{%- elif message.role == 'assistant' %}
{%- if 'tool_calls' in message %}{{ '<|start|>assistant to=' + message.tool_calls[0].function.name + '<|call|>' }}
{%- elif loop.last and not add_generation_prompt %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
{%- else %}{{ '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}{% endif %}
{%- elif message.role == 'tool' %}{{ '<|start|>tool<|message|>' + message.content | tojson + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
"""
"""Like gpt-oss: channels, the date, tools only beside a system message."""

PARTS = """
{%- macro text_of(content) %}
{%- if content is string %}{{ content }}
{%- elif content is iterable %}{% for part in content if part.type == 'text' %}{{ part.text }}{% endfor %}
{%- else %}{{ content }}{% endif %}
{%- endmacro %}
{{- '[gMASK]<sop>' }}
{%- for message in messages %}
{%- set content = text_of(message.content) %}
{%- if message.role == 'assistant' and '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<|' + message.role + '|>\\n' }}
{%- if message.role == 'assistant' %}{{ '<think></think>\\n' }}{% endif %}
{{- content.strip() }}
{%- for call in message.tool_calls %}{{ '\\n<tool_call>' + call.function.name }}{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{{ '<think></think>' if enable_thinking is sameas false }}{% endif %}
"""
"""Like GLM: takes parts of contents by itself, prints None for nothing, strips contents."""

JSON_CONTENT = """
{{- bos_token }}
{%- for message in messages %}
{%- set content = message.content if message.content is string else message.content | tojson %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
"""Like LFM2: prints whatever is no text as JSON, knows no calls."""

FLAGGED = """
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set mode = '/no_think' if '/no_think' in system or enable_thinking is sameas false else '/think' %}
{{- '<|im_start|>system\\nToday: ' + strftime_now('%d %B %Y') + '\\nMode: ' + mode + '\\n' }}
{{- system.replace('/no_think', '').replace('/think', '').rstrip() + '<|im_end|>\\n' }}
{%- for message in messages if message.role != 'system' %}
{{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' }}
{{- message.content.split('</think>')[-1].lstrip('\\n') if message.role == 'assistant' and not loop.last else message.content }}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
"""Like SmolLM3: the date, flags taken out of the system text."""

NAMED = {"default": ROLE_TAGS, "tool_use": CHATML, "rag": "{{ documents[0].text }}"}
"""Like Command-R: several templates by name."""

ALL = {
    "chatml": CHATML,
    "thinking": THINKING,
    "dated": DATED,
    "alternating": ALTERNATING,
    "role tags": ROLE_TAGS,
    "instruction": INSTRUCTION,
    "reasoning": REASONING,
    "channels": CHANNELS,
    "parts": PARTS,
    "json content": JSON_CONTENT,
    "flagged": FLAGGED,
    "named": NAMED,
}
