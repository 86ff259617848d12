"""``millrace report``: a run, or several, as one HTML page. ``page`` is the verb; the others gather what it shows."""
