"""TRL's settings in Millrace's: what ``launch/import_trl.py`` reads (``script``, ``found``) and how it translates (``rules``)."""
