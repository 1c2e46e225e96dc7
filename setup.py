"""Makes the long description from the README. All else is in setup.cfg.

A package index has no checkout: images of the repository are removed, and links
into it become plain text.
"""

import pathlib
import re

import setuptools

TEXT = pathlib.Path(__file__).with_name('README.md').read_text('utf-8')
TEXT = re.sub(r'!\[[^]]*\]\((?!https:)[^)]*\)\n*', '', TEXT)
TEXT = re.sub(r'\[([^]]*)\]\((?!https:)[^)]*\)', r'\1', TEXT)

setuptools.setup(long_description=TEXT)
