"""Kinds of engines, a folder each: how one is started, asked, and given weights."""
