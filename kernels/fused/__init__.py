"""Triton kernels and their registration with torch. Imported when an operation first runs in Triton, never before."""
