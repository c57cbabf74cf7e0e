"""A writer that answers every question of the steps of elicitation in the form it asks for, with words of its own for each request."""

from __future__ import annotations

import re

from limbeck.types import Generated, LogProb


def words_of(request, count=5):
    """Made-up words, others for every request."""
    key = request.key
    return ["".join(chr(97 + int(letter, 16)) for letter in key[6 * n : 6 * n + 5]) for n in range(count)]


def plausible(request):
    """The answer to a request, judged by how its question begins or ends."""
    text, made = request.conversation[-1]["content"] if request.conversation else "", words_of(request)
    said = " ".join(made)
    if request.raw is not None:
        return f"Why is {said} so?"
    if any("<think>" in message["content"] for message in request.conversation[:1]):
        return f"<think>{said} as 2 + 2 = 4.</think>The answer is {4 if int(request.key[0], 16) % 2 else 5}."
    for mark, answer in {
        "Here is a list of tasks": f"Tell {said} today.",
        "\nClassification:": "No",
        "For the task, write an input": f"Output: {said}",
        "more tasks like these": f" Tell {said} today.\nInput: <noinput>\nOutput: {said}",
        "New prompt:": f"Tell {said} in detail",
        "Do these two prompts": "Not equal",
        "The right answer is": f"{said} as 2 + 2 = 4. The answer is 4.",
        "Think step by step, and end": f"{said} as 2 + 2 = 4. The answer is 4.",
        "Mend the attempt:": f"{said}: 2 + 2 = 4, so it is 4.",
        "Let's think step by step.": f"{said} as 2 + 2 = 4.",
        "Therefore, the answer is": "Therefore, the answer is 4.",
        "\n\nNew request:": f"Tell {said} today.",
        "In other words:": f"{said}: " + text.partition("Problem: ")[2].partition("\n")[0],
        "\nStatement:": "It takes 2 and 2 to make 4.",
        "Write three wrong": "one\n2. two\n3. three",
        "Task: (the task)": f"Task: Tell {said}\nAnswer: {text.partition(chr(10))[2].partition(chr(10))[0]}",
        "Problem: (everything": f"Problem: Print {said}\nSolution: so\n```python\nprint('{said}')\n```",
        "\nUser:": f"And {said}?",
        "Write this part anew": f"So {said} it is. {said.upper()} too, and more of {said[:11]}. Then on.",
        "Go on where the beginning ends": f"There is {' '.join(words_of(request, 9))} besides.",
        "Answer with the number alone": str(int(request.key[0], 16) % 6),
        "Describe the text as JSON": f'{{"topic": "{said}", "kind": "story", "names": []}}',
        "Answer with one word, yes or no": "Yes." if "2 and 2" in text else "no",
    }.items():
        if mark in text:
            return answer
    if "\nRATING 1: <number>" in text:
        return f"RATING 1: {1 + int(request.key[0], 16) % 5}\nRATING 2: {1 + int(request.key[1], 16) % 5}"
    if compared := re.search(r"\n\nAnswer A:\n(.*?)\n\nAnswer B:\n(.*?)\n\n", text, re.DOTALL):
        return f"So.\nVERDICT: {'A' if compared[1] < compared[2] else 'B' if compared[2] < compared[1] else 'TIE'}"
    if story := re.search(r'verb "(.*?)", the noun "(.*?)" and the adjective "(.*?)"', text):
        return f"{' '.join(story.groups())} {said}."
    return f"So {said} it is."


def answers(_teacher, requests, stop=lambda: False):
    """In place of a teacher's `answers`, the last request first."""
    for request in reversed(requests):
        yield request, Generated(None, plausible(request), "ok", usage=(1, 1))


def log_probs(_scorer, questions):
    """In place of a scorer's: a text after its prompt is somewhat likelier than alone, and the first choice the likeliest."""
    return [
        LogProb(-(0.5 + int(question.key[:4], 16) / 2**17) * (1.0 if question.messages else 1.5) * 4, 4)
        for question in questions
    ]
