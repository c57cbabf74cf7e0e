"""What the servers of the benchmarks are asked, and the model that they serve."""

MODEL = "smollm2-135m-instruct"
QUESTIONS = (
    "Why is the sky blue?", "Name three fruits.", "How do I boil an egg?", "What is a prime number?",
    "Write a sentence about the sea.", "Who was Ada Lovelace?", "Give me a rhyme with 'tree'.", "What does a clock do?",
)  # fmt: skip
