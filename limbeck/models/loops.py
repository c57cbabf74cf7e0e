"""Asynchronous work in code that is not: a coroutine run to its end, and a generator step by step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

T = TypeVar("T")
END = object()  # what a generator that has ended gives


def run_async(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The coroutine's result, also in a thread that already runs a loop (a notebook's)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work()).result()


def iterated(stream: AsyncGenerator[T]) -> Iterator[T]:
    """What an asynchronous generator gives, in a loop of its own. Whatever breaks it off, also in the middle of a step,
    its tasks are cancelled and awaited."""
    loop = asyncio.new_event_loop()
    try:
        while (value := loop.run_until_complete(_next(stream))) is not END:
            yield cast(T, value)
    finally:
        try:
            loop.run_until_complete(_ended(stream))
        finally:
            loop.close()


async def _next(stream: AsyncGenerator[T]) -> T | object:
    return await anext(stream, END)


async def _ended(stream: AsyncGenerator[Any]) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await stream.aclose()
