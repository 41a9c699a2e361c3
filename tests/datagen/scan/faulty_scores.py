"""Scores that do to their process what a bad picture can do to a decoder."""

import ctypes
import os
import signal
import time

import numpy as np

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def corner(pixels: np.ndarray) -> tuple[int, ...]:
    """The tests mark guilty pictures by the colour of a corner."""
    return tuple(pixels[0, 0].tolist())


def red(pixels: np.ndarray) -> bool:
    return corner(pixels) == RED


def brightness(pixels: np.ndarray) -> float:
    return float(pixels.mean())


def die(pixels: np.ndarray) -> float:
    if corner(pixels) == RED:
        os.kill(os.getpid(), signal.SIGKILL)  # As the kernel does when memory runs out.
    if corner(pixels) == GREEN:
        os._exit(3)
    if corner(pixels) == BLUE:
        ctypes.string_at(0)
    return brightness(pixels)


def hang_with_the_lock(pixels: np.ndarray) -> float:
    if red(pixels):
        ctypes.PyDLL(None).sleep(600)  # Holds the interpreter's lock: no Python thread runs meanwhile.
    return brightness(pixels)


def eat_memory(pixels: np.ndarray) -> float:
    eaten = []
    while red(pixels):
        eaten.append(np.ones(16 * 1024**2, np.uint8))
        time.sleep(0.01)
    return brightness(pixels)


def die_all(pixels: np.ndarray) -> float:
    os._exit(1)


def complain(pixels: np.ndarray) -> float:
    if red(pixels):
        raise RuntimeError("no red, please")
    return brightness(pixels)


def nothing(pixels: np.ndarray) -> float:
    return float("nan")


def slowly(pixels: np.ndarray) -> float:
    time.sleep(0.3)
    return brightness(pixels)


NOT_A_FUNCTION = 7
