"""Kernels in C++ for a CPU: what compiles them, and one pair of files for each, NAME.cpp and NAME.py that calls it."""
