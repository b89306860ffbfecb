"""Profiles that tests write: a search that takes seconds, and whatever else is to be run."""
from pathlib import Path
import yaml


def short_search(
    **settings, # Of the search, besides its goal
) -> dict: # a run
    "A search for the smallest model, whatever it loses."
    return {'method': 'search', 'id': 'search-size', 'set': {'objective': 'size', 'es_drop': 100., **settings}}


def write_profile(path, *runs: dict):
    "Write a profile that completes four samples a run."
    profile = {'about': 'of a test, takes seconds', 'set': {'seed': 42, 'codexglue': 4, 'thesis': 0}, 'runs': list(runs)}
    Path(path).write_text(yaml.safe_dump(profile), encoding='utf-8')
