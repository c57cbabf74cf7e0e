"""(check, answers that pass, answers that fail)"""


def exact(*right: str, **more) -> dict:
    return {"type": "exact", "answer": right[0] if len(right) == 1 else list(right), **more}


TABLE = [
    (exact("Paris"), ["Paris", "paris", "Paris.", "  Paris\n", "**Paris**", "“Paris”", "The Paris", "PARIS!", "<think>Rome</think>Paris", "<think>\nFrance, so Paris.\n</think>\n\nParis", "Ｐａｒｉｓ", "Paris\u200b", "(Paris)"], ["", "Rome", "Paris, France", "not Paris", "Paris or Rome", "Pari", "comparison", "<think>Paris", "<think>Paris</think>", "Paris Paris", "P a r i s"]),
    (exact("café"), ["café", "cafe\u0301", "CAFÉ", "Café."], ["cafe", "cafés", "café au lait"]),
    (exact("The Nile", "Nile river"), ["the nile", "a Nile River!", "Nile", "Nile  river"], ["The Nile river in Egypt", "river", "nil"]),
    (exact("C++"), ["C++", "c++", "C++."], ["C", "C#", "C+"]),
    (exact("-5"), ["-5", "−5", "-5."], ["5", "+5", "- 6"]),
    (exact("x+1"), ["x+1", "x + 1", "X+1."], ["x-1", "x 1", "x1"]),
    (exact("x"), ["x", "X."], ["-x", "+y"]),
    (exact("5"), ["5", "$5"], ["5%", "5 %", "-5"]),
    (exact("5%"), ["5%", "5 %."], ["5", "-5%"]),
    (exact("$5"), ["$5", "5"], ["-$5"]),
    (exact("covid-19"), ["COVID 19", "Covid-19"], ["covid"]),
    (exact("1.5"), ["1.5", "1.5."], ["15", "1 5", "1,5", "1.50"]),
    (exact("1/2"), ["1/2", "½"], ["12", "1 2", "2/1"]),
    (exact("x < 3"), ["x < 3", "X < 3."], ["x > 3", "x 3", "x = 3"]),
    (exact("A"), ["A", "a", "A.", "(A)"], ["", "the", "B", "an", "A B"]),
    (exact("vitamin A"), ["vitamin A", "the vitamin A"], ["vitamin", "vitamin B"]),
    (exact("👍"), ["👍", " 👍 ", "👍️"], ["👎", "", "!", "👍👍"]),
    (exact("?!"), ["?!", " ?! "], ["", "!", "a", "??"]),
    (exact("हिन्दी"), ["हिन्दी", "हिन्दी।"], ["हन्द", "हिन्द", "हिंदू"]),
    (exact("かぎ"), ["かぎ", "かぎ。", "「かぎ」", "か\u304d\u3099"], ["かき", "カギです", "鍵"]),
    (exact("กา"), ["กา"], ["กี", "ก", "กำ"]),
    (exact("Straße"), ["Straße", "STRASSE", "strasse"], ["Strase", "Strassen"]),
    (exact("北京"), ["北京", "北京。", "《北京》"], ["南京", "北京市", "东京"]),
    (exact("القاهرة"), ["القاهرة", "القاهرة."], ["قاهرة", "القاهره الكبرى"]),
    (exact("Москва"), ["Москва", "москва!", "МОСКВА"], ["Moskva", "Москвы"]),
    (exact("No", normalise=False), [" No\n", "No"], ["no", "No.", "**No**", "NO"]),
    (exact("é", normalise=False), ["e\u0301", "é"], ["e", "É"]),
]  # fmt: skip
