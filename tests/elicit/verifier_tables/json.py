"""(check, answers that pass, answers that fail)"""

ONE = {"type": "json", "equals": {"a": 1}}
PARIS = {"type": "json", "equals": {"city": "Paris"}}
DEEP = {"type": "json", "equals": {"tags": ["x", 2], "at": {"lat": 1.5, "ok": True}, "note": None}}
CAFE = {"type": "json", "equals": {"名前": "café"}}

TABLE = [
    (ONE, [
        '{"a": 1}', '{"a": 1.0}', '{"a": 1, "b": 2}', '```json\n{"a": 1}\n```', '```\n{"a": 1}\n```', '```JSON\n{"a": 1}\n```', '```json {"a": 1}```', 'Here {as asked}: {"a": 1}', 'Sure!\n\n{"a": 1}\n\nHope that helps.',
        '{ "a" :\n 1 }', '[{"a": 1}]', '{x} {"a": 1}', '<think>{"a": 2}</think>{"a": 1}', '{"a": 1} {"a": 1.0}', '{"a": 1}{"b": 3}', 'Voici : {"a": 1}.', '结果：{"a": 1}', '{"a":1e0}', '}{"a": 1}', '{"a": 1, "a": 1}', '{{"a": 1}}', '{"a": 2,} was broken: {"a": 1}', '**{"a": 1}**',
        '```json\n{"a": 1}', 'In `{braces}`:\n```json\n{"a": 1}\n```\nand {"a": 2} would be wrong',
    ], [
        "", "1", "a: 1", '{"a": 2}', '{"a": "1"}', '{"a": true}', '{"a": null}', '{"a": [1]}', '{"b": 1}', '{"A": 1}', "{'a': 1}", '{"a": 1', '{"a": 1,}', '{a: 1}', '{"a": 1.5}', '{"a": -1}', '{"a": NaN}', '{"a": 1} or {"a": 2}', '{"a": 2} {"a": 1}',
        '{"a": 1, "a": 2}', '{"a": 2, "a": 1}', '[1]', '{"x": {"a": 1}}', '{"x": {"a": 1}', '{"x": {"a": 1},}', '<think>{"a": 1}</think>{"a": 2}', '<think>{"a": 1}', '```json\n{"a": 2}\n```\n{"a": 1}', "{" * 500, '{"a": Infinity}', '{"a": 01}', '"{\\"a\\": 1}"', '{"a": {"a": 1}}', '{}', '{"a": 1 /* one */}', '{"a": 10}',
    ]),
    (PARIS, ['<think>\nIt could be A or B, 3 of them... {"x": 1}, no.\n</think>\n\n{"city": "Paris"}', '{"city": "Paris"}', '{"city": " paris "}', '{"city": "PARIS", "land": "France"}', 'La ville : {"city": "Paris"}', '{"city":"\\u0050aris"}'], [
        '{"city": "Paris."}', '{"city": "Paris, France"}', '{"city": "Rome"}', '{"city": ["Paris"]}', '{"city": "Paris"}\nor {"city": "Rome"}', '{"city": "comparison"}', '{"town": "Paris"}', "Paris", '{"city": ""}', '{"city": "not Paris"}']),
    (DEEP, ['{"tags": ["x", 2], "at": {"lat": 1.5, "ok": true}, "note": null}', '{"note": null, "at": {"ok": true, "lat": 1.50}, "tags": ["X", 2.0], "more": 1}', 'Это: {"tags": [" x", 2], "at": {"lat": 15e-1, "ok": true}, "note": null}'], [
        '{"tags": [2, "x"], "at": {"lat": 1.5, "ok": true}, "note": null}', '{"tags": ["x", 2], "at": {"lat": 1.5, "ok": 1}, "note": null}', '{"tags": ["x", 2], "at": {"lat": 1.5, "ok": true}}',
        '{"tags": ["x", 2, 3], "at": {"lat": 1.5, "ok": true}, "note": null}', '{"tags": ["x", 2], "at": {"lat": 1.5, "ok": true, "z": 1}, "note": null}', '{"tags": ["x", true], "at": {"lat": 1.5, "ok": true}, "note": null}', '{"tags": "x2", "at": {"lat": 1.5, "ok": true}, "note": null}']),
    (CAFE, ['{"名前": "café"}', '{"名前": "cafe\u0301"}', '{"名前": "CAFÉ"}', '答え：{"名前": "café"}', '{"名前": "caf\\u00e9"}', '{"\\u540d\\u524d": "café"}', '```json\n{\n  "名前": "café"\n}\n```', '{"名前": "café", "年": 3}'], ['{"名前": "cafe"}', '{"名前": "cafés"}', '{"名": "café"}']),
]  # fmt: skip
