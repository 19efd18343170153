"""Programs built on the package: command line, web service, export, course tools."""
