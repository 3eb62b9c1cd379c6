"Rows of a study that a test made up"
import csv

def written(file, rows, columns):
    with open(file, 'w', newline='') as f:
        w = csv.DictWriter(f, columns, lineterminator='\n')
        w.writeheader()
        w.writerows(rows)
    return file
