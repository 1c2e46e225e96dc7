"""The README as the description of the package, where no checkout is at hand.

Its pictures are left out, and of links into the checkout the words stay. What
else there is to say stands in setup.cfg.
"""

import pathlib
import re

import setuptools

TEXT = pathlib.Path(__file__).with_name('README.md').read_text('utf-8')
TEXT = re.sub(r'!\[[^]]*\]\((?!https:)[^)]*\)\n*', '', TEXT)
TEXT = re.sub(r'\[([^]]*)\]\((?!https:)[^)]*\)', r'\1', TEXT)

setuptools.setup(long_description=TEXT)
