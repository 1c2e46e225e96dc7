"""The mathematics: pure functions of arrays, blind to devices and files."""
