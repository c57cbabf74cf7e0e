"""When a difference may be called clear: the thresholds that evaluation and report share."""

from __future__ import annotations

CONFIDENCE = 0.95  # of every interval
SIGNIFICANCE = 0.05  # p-values below this count
# with fewer items the bootstrap finds a difference where there is none far too often: 15 % of the time with 5 items
LEAST_ITEMS = 10
CLEAR_ITEMS = 30  # with fewer, a sentence about a result says how few there are and calls nothing clear
