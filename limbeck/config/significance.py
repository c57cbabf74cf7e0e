"""When a difference may be called clear: the thresholds that evaluation and report share."""

from __future__ import annotations

CONFIDENCE = 0.95  # of every interval
SIGNIFICANCE = 0.05  # p-values below this count
# with fewer items the bootstrap finds a difference where there is none far too often: 15 % of the time with 5 items
LEAST_ITEMS = 10  # for a p value
# Rule of thumb: under so many items nothing is called clear. The percentile bootstrap, meant to be wrong about a
# difference of 0 in 5 % of the cases, is in 10 % with 10 items, 6 % with 30 (normal values; twice that if they are
# skewed, as token sums are).
CLEAR_ITEMS = 30
# A single training's interval is over its items alone: another seed gives another student, and the interval knows
# nothing of it. Two seeds are the least that show how far they differ.
LEAST_SEEDS = 2
# In fewer updates, a tenth of them warm-up, a student has hardly left its start: what is compared is the start.
LEAST_STEPS = 30
