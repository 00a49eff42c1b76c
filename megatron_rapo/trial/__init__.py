"""One problem through template, engines, environment and reward, to be looked at."""
