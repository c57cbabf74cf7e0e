"""(check, answers that pass, answers that fail)"""

HEIGHT = {"type": "tool_call", "calls": [{"name": "height", "arguments": {"n": [7]}}]}
TWO = {"type": "tool_call", "calls": [{"name": "a", "arguments": {"x": [1]}}, {"name": "b"}]}
WORDS = {
    "type": "tool_call",
    "calls": [{"name": "weather", "arguments": {"city": ["Zürich", "Oslo"], "days": [1, None], "now": [True, None]}}],
}

TABLE = [
    (HEIGHT, [
        '{"name": "height", "arguments": {"n": 7}}', '{"name": "height", "arguments": {"n": 7.0}}', '{"name": "height", "parameters": {"n": 7}}', '{"name": "height", "arguments": "{\\"n\\": 7}"}', '[{"name": "height", "arguments": {"n": 7}}]',
        '<tool_call>\n{"name": "height", "arguments": {"n": 7}}\n</tool_call>', '<tool_call>{"name": "height", "arguments": {"n": 7}}', '<think>\nUse height.\n</think>\n\n<tool_call>\n{"name": "height", "arguments": {"n": 7}}\n</tool_call>', '<think>\nheight(n=8)?\n</think>\n\n<tool_call>\n{"name": "height", "arguments": {"n": 7}}\n</tool_call>',
        '[TOOL_CALLS] [{"name": "height", "arguments": {"n": 7}}]', '[TOOL_CALLS]height{"n": 7}', '[TOOL_CALLS]height[ARGS]{"n": 7}', '[TOOL_CALLS]height[CALL_ID]abc123[ARGS]{"n": 7}',
        '{"tool_calls": [{"type": "function", "function": {"name": "height", "arguments": "{\\"n\\": 7}"}}]}', '{"type": "function", "function": {"name": "height", "arguments": {"n": 7}}}', '{"type": "function", "name": "height", "parameters": {"n": 7}}',
        "[height(n=7)]", "[ height( n = 7 ) ]", "```python\n[height(n=7)]\n```", "```tool_code\nheight(n=7)\n```", "```tool_code\nprint(default_api.height(n=7))\n```", "<|python_tag|>height.call(n=7)", '<|python_tag|>{"name": "height", "parameters": {"n": 7}}', "[height(n=7)]\nDone.",
        '```json\n{"name": "height", "arguments": {"n": 7}}\n```', 'I will look it up.\n{"name": "height", "arguments": {"n": 7}}', "Je cherche {x} :\n" '{"name": "height", "arguments": {"n": 7}}', '<function=height>{"n": 7}</function>',
        "<tool_call>\n<function=height>\n<parameter=n>\n7\n</parameter>\n</function>\n</tool_call>", "<tool_call>height\n<arg_key>n</arg_key>\n<arg_value>7</arg_value>\n</tool_call>", '<invoke name="height"><parameter name="n">7</parameter></invoke>',
        '<|channel|>commentary to=functions.height <|constrain|>json<|message|>{"n": 7}<|call|>', '<|channel|>analysis<|message|>n is 8?<|end|><|start|>assistant<|channel|>commentary to=functions.height <|constrain|>json<|message|>{"n": 7}<|call|>',
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>height\n```json\n{"n": 7}\n```<｜tool▁call▁end｜>', '<｜tool▁call▁begin｜>height<｜tool▁sep｜>{"n": 7}<｜tool▁call▁end｜>', '<|tool_calls_section_begin|><|tool_call_begin|>functions.height:0<|tool_call_argument_begin|>{"n": 7}<|tool_call_end|>',
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "height", "parameters": {"n": 7}}]<|END_ACTION|>', '<|tool_call|>[{"name": "height", "arguments": {"n": 7}}]', 'functools[{"name": "height", "arguments": {"n": 7}}]', '{"name": "functions.height", "arguments": {"n": 7}}', '{"name": "height", "arguments": {"n": 7}, "id": "call_1"}',
    ], [
        "", "height", "height(n=7)", "I'd use height(n=7) here.", "call height with 7", '{"name": "height"}', '{"name": "height", "arguments": {}}', '{"name": "height", "arguments": {"n": 8}}', '{"name": "height", "arguments": {"n": "7"}}', '{"name": "height", "arguments": {"n": true}}',
        '{"name": "height", "arguments": {"n": 7, "m": 1}}', '{"name": "Height", "arguments": {"n": 7}}', '{"name": "width", "arguments": {"n": 7}}', '{"name": "height", "arguments": {"n": 7}', '{"name": "height", "arguments": "n=7"}', '{"arguments": {"n": 7}}', '{"n": 7}', "[7]", "[height(7)]", "[height(n=8)]",
        "[height(n=7), height(n=7)]", "[height(n=7), width(n=7)]", "[height(n=7+0)]", "[height(n=__import__('os'))]", '{"name": "height", "arguments": {"n": 7}}\n{"name": "width", "arguments": {"n": 7}}', '{"name": "height", "arguments": {"n": 7}} or {"name": "height", "arguments": {"n": 8}}',
        '<tool_call>{"name": "height", "arguments": {"n": 7}}</tool_call><tool_call>{"name": "height", "arguments": {"n": 8}}</tool_call>', '<tool_call>{"name": "height", "argum', '<think><tool_call>{"name": "height", "arguments": {"n": 7}}</tool_call>', '<think>{"name": "height", "arguments": {"n": 7}}</think>It is 3 m.',
        '[TOOL_CALLS]height[ARGS]{"n": 8}', "[TOOL_CALLS]", '<function=height>{"n": 8}</function>', "<tool_call><function=height><parameter=n>8</parameter></function></tool_call>", "<tool_call>height</tool_call>", "<|python_tag|>height(7)", '<|channel|>final<|message|>{"n": 7}', '<|channel|>commentary to=functions.width<|message|>{"n": 7}<|call|>',
        '{"tool_calls": []}', '{"tool_calls": [{"function": {"name": "height", "arguments": "{\\"n\\": 8}"}}]}', '{"name": "height", "arguments": {"n": 7, "n": 8}}',
    ]),
    (TWO, ['[{"name": "a", "arguments": {"x": 1}}, {"name": "b"}]', '{"name": "a", "arguments": {"x": 1}}\n{"name": "b", "arguments": {}}', "[a(x=1), b()]", '<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call>\n<tool_call>{"name": "b", "arguments": null}</tool_call>', '[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b[ARGS]{}'],
     ["[b(), a(x=1)]", "[a(x=1)]", "[b()]", "[a(x=1), b(), b()]", '{"name": "a", "arguments": {"x": 1}}']),
    (WORDS, ['{"name": "weather", "arguments": {"city": "zürich"}}', '{"name": "weather", "arguments": {"city": "Zu\u0308rich", "days": 1}}', '[weather(city="Oslo", now=true)]', '[weather(city="Oslo", now=True)]', '<tool_call><function=weather><parameter=city>Oslo</parameter><parameter=now>true</parameter></function></tool_call>'],
     ['{"name": "weather", "arguments": {"city": "Zurich"}}', '[weather(city="Oslo", now=false)]', '[weather(city=Oslo)]', '{"name": "weather", "arguments": {"days": 1}}', '{"name": "weather", "arguments": {"city": ["Oslo"]}}']),
]  # fmt: skip
