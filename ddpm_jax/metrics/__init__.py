"""How good samples are: functions of arrays, and the networks they need."""
