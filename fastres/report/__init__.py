"""Tables, pictures and reports of what runs wrote."""

import matplotlib

matplotlib.use("Agg")  # which needs no display
