"""Tests of recurrent layers."""
