"""(check, answers that pass, answers that fail)"""


def schema(**parts) -> dict:
    return {"type": "json_schema", "schema": parts}


PERSON = schema(
    type="object",
    properties={"name": {"type": "string", "minLength": 1}, "age": {"type": "integer", "minimum": 0}},
    required=["name", "age"],
    additionalProperties=False,
)
NUMBERS = schema(type="array", items={"type": "integer"}, minItems=2, uniqueItems=True)
MOOD = schema(type="object", properties={"情绪": {"enum": ["正面", "负面"]}}, required=["情绪"])
DEEP = schema(
    **{"$defs": {"node": {"type": "object", "properties": {"sub": {"type": "array", "items": {"$ref": "#/$defs/node"}}}, "required": ["id"]}}},
    **{"$ref": "#/$defs/node"},
)  # fmt: skip
DATE = schema(type="object", properties={"date": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"}, "note": {"type": ["string", "null"]}}, required=["date", "note"])  # fmt: skip
COUNT = schema(type="integer")
ADA = '{"name": "Ada", "age": 36}'

TABLE = [
    (PERSON, [
        ADA, '{"age": 36.0, "name": "Ada"}', f"```json\n{ADA}\n```", f"```\n{ADA}\n```", f"```JSON\n{ADA}\n```", f"```json {ADA}```", f"Sure! Here it is:\n\n{ADA}\n\nHope that helps {{smile}}.", f"<think>{{\"name\": 1}}</think>\n\n{ADA}", f"**{ADA}**", f"`{ADA}`",
        f"<answer>{ADA}</answer>", f"结果：{ADA}。", f"Voici :\n{ADA}", f"```json\n{ADA}", '{"name": "Ада", "age": 0}', '{"name": "\\u0041da", "age": 1}', '{\n  "name": "अदा",\n  "age": 36\n}', '{"name": "عائشة", "age": 20}', f"```bash\npip install ada\n```\nthen\n```json\n{ADA}\n```",
        f"~~~json\n{ADA}\n~~~", f"1. Here:\n   ```json\n   {ADA}\n   ```", f"As [1] says: {ADA}", f"```json5\n{ADA}\n```", f"\ufeff{ADA}", f"```python\nprint(x)\n```\nprints {ADA}",
    ], [
        "", "Ada, 36", '{"name": "Ada"}', '{"name": "Ada", "age": "36"}', '{"name": "Ada", "age": true}', '{"name": "Ada", "age": -1}', '{"name": "", "age": 1}', '{"name": "Ada", "age": 36.5}', '{"name": "Ada", "age": 36, "sex": "f"}', "{'name': 'Ada', 'age': 36}",
        '{"name": "Ada", "age": 36,}', '{"name": "Ada", "age": 36', "{name: Ada, age: 36}", f"[{ADA}]", f"Here: [{ADA}]", f"```json\n[{ADA}]\n```", f"{ADA}\n{ADA[:-3]}7}}", f"<think>{ADA}</think>I don't know.", f"<think>{ADA}", '{"name": "Ada", "age": null}', '{"name": "Ada", "age": NaN}',
        '{"name": "Ada", "age": 36, "age": 37}', f'```json\n{{"name": "Ada"}}\n```\nor {ADA}', f'{{"person": {ADA}}}', f'{{"person": {ADA},}}', f'{{"person": {ADA}', f"[{ADA},]", f'```json\n{{"person": {ADA},}}\n```', '{"name": "Ada", // her name\n"age": 36}', "null", '{"name": "Ada", "age": 036}', '{"name": "Ada", "age": ３６}', '｛"name": "Ada", "age": 36｝', "{“name”: “Ada”, “age”: 36}", '{"Name": "Ada", "age": 36}',
    ]),
    (NUMBERS, ["[1, 2]", "[1, 2.0, 3]", "```json\n[1, 2]\n```", "Sure: [1, 2]", "The primes are [2, 3, 5].", "答案：[1,2]", "<think>[1]</think>[1, 2]", "```\n[\n  1,\n  2\n]\n```\nDone."], ["[1]", "[1, 1]", "[1, 1.0]", '["1", "2"]', "1, 2", "[1, 2", "{}", "[1, 2.5]", "[1, true]", "(1, 2)", "[1, 2] or [3, 4]", "[１, ２]"]),
    (MOOD, ['{"情绪": "正面"}', '{"\\u60c5\\u7eea": "\\u8d1f\\u9762"}', '好的：\n```json\n{"情绪": "负面"}\n```', '{"情绪": "正面", "置信度": 0.9}'], ['{"情绪": "中性"}', '{"情绪": "正面。"}', '{"mood": "正面"}', "正面", '{"情绪": ["正面"]}']),
    (DEEP, ['{"id": 1}', '{"id": 1, "sub": [{"id": 2, "sub": []}]}'], ['{"id": 1, "sub": [{"sub": []}]}', '{"sub": []}', '{"id": 1, "sub": {"id": 2}}']),
    (DATE, ['{"date": "2024-02-03", "note": null}', '{"date": "2024-02-03", "note": "früh"}'], ['{"date": "3.2.2024", "note": null}', '{"date": "2024-02-03"}', '{"date": "2024-02-03", "note": 1}', '{"date": 20240203, "note": null}']),
    (COUNT, ["42", " 42\n", "42.0", "```json\n42\n```", "<think>41?</think>42"], ["42.5", '"42"', "It is 42", "true", "４２", "**42**", "forty-two"]),
]  # fmt: skip
